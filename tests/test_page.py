"""Every control of the page."""
from small_runs import small_runs
from test_streamlit import EN, open_page


def asked_of(monkeypatch):
    """Every setting of the side, changed on a page without a browser: what the model was asked for."""
    from engine import chat
    asked, answer = [], chat.Speaker.answer

    def listen(self, messages, **settings):
        asked.append((messages, settings))
        return answer(self, messages, **settings)
    monkeypatch.setattr(chat.Speaker, "answer", listen)
    return asked


def test_every_setting_reaches_the_model(monkeypatch):
    asked = asked_of(monkeypatch)
    talk = open_page(monkeypatch, f"--output_path={small_runs()}")
    wanted = {"temperature": 0.0, "top_p": 0.5, "max_new_tokens": 3, "top_k": 7, "min_p": 0.1,
              "repetition_penalty": 1.1, "frequency_penalty": -0.5, "presence_penalty": 0.5, "seed": 5}
    for name, value in wanted.items():
        next(one for one in [*talk.slider, *talk.number_input] if one.label == EN[name]).set_value(value)
    talk.text_area(key="system").set_value(" be brief ")
    talk.chat_input[0].set_value("背一首春晓").run()
    assert asked == [([{"role": "system", "content": "be brief"}, {"role": "user", "content": "背一首春晓"}], wanted)]
    assert any(caption.value.startswith("3 tokens") for caption in talk.caption) and not talk.exception
