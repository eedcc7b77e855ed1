"""The pipeline: chunks of raw records are cleaned, filtered, encoded, deduplicated and written as token files."""
