"""The browser page of run_model.py. Texts of users and models are never interpreted as markup."""
