"""A card that is not here: the table's rows for it, with rows of one's own in front."""
from nanogpt_fast.kernels import fastest


def on_card(monkeypatch, arch, rows=(), name="a card"):
    """From now on every device number is a card of this architecture of the table (0: a CPU), and `rows` come before the shipped ones."""
    monkeypatch.setattr(fastest, "place", lambda device: (arch, name))
    monkeypatch.setattr(fastest, "_table", fastest.Table([*rows, *fastest.SHIPPED]))
