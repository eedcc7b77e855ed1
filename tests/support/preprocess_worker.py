"""Preprocessing as a separate process that saves its progress very often, for tests that kill it."""

from preprocess_data import preprocess_data
from preprocess_data.pipeline import prepare
from preprocess_data.readers import records
from utils.errors import run_script

if __name__ == "__main__":
    records.CHUNK_BYTES = 1 << 14
    prepare.SAVE_SECONDS = 0.05
    prepare.write_report = lambda *_: "none"  # what is tested happens before the report
    run_script(preprocess_data.main)
