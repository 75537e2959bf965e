"""manyhats beside llama.cpp, vLLM, transformers and PEFT, in one interleaved run."""
