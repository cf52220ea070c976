"""What every message about a user's mistake must be."""


def assert_one_sentence(error, *words):
    text = str(error)
    assert "\n" not in text, text
    assert "Traceback" not in text
    assert len(text) < 500, text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
