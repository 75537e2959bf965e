"""How adapters lie in files: names of formats, of bases and of files, JSON and safetensors."""
