"""Raw text to token files: readers per format, named corpora, and the pipeline that cleans and encodes."""
