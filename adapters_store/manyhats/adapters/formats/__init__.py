"""How adapters are stored in files: names of formats, of bases and of files, JSON and safetensors."""
