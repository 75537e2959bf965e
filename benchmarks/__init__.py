"""Speed, memory and start-up of this project, beside transformers with bitsandbytes and PEFT on the same weights."""
