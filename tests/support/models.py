"""The models that tests run with. A plugin that is dropped into model/ is none of them."""

SHIPPED = ("mini_deepseekv3", "mini_llama3")
BASE_MODEL = "mini_deepseekv3"  # of the small run that continues a text
CHAT_MODEL = "mini_llama3"  # of the small run that answers
