"""The parts of the page in the browser (run_model.py): what a person or a model wrote is markup in none of them."""
