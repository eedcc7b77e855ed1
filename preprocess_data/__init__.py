"""Raw text to token files: readers, named corpora, cleaning, chat rows."""
