def make_chat(folder, rows):
    raise NotImplementedError
