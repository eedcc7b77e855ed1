"""Readers: files to chunks of raw bytes, chunks to records. One module per format, found by the file's suffix."""
