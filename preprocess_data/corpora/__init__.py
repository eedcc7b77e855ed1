"""Named corpora: where each is stored, what its documents are, and how it is fetched or made."""
