"""Parts of a benchmark that end in every way."""
