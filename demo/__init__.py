"""The demo of run_demo.sh: its presets, its measurements and its timings."""
