import torch

from ip2p.training.ema import Ema


def test_the_average_matches_the_decay_warm_up_of_the_released_code():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    ema, expected = Ema(model, max_decay=0.5), 0.0
    for n in range(1, 20):
        torch.nn.init.constant_(model.weight, float(n))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert abs(ema.average["weight"].item() - expected) < 1e-4


def test_the_state_survives_a_round_trip():
    model = torch.nn.Linear(3, 2)
    ema = Ema(model)
    torch.nn.init.zeros_(model.weight)
    ema.update(model)
    restored = Ema(torch.nn.Linear(3, 2))
    restored.load_state_dict(ema.state_dict())
    assert restored.updates == 1
    assert all(
        torch.equal(a, b) for a, b in zip(ema.average.values(), restored.average.values(), strict=True)
    )


def test_an_update_with_times_4_matches_four_updates():
    model = torch.nn.Linear(3, 2)
    once, repeated = Ema(model), Ema(model)
    for _ in range(5):
        torch.nn.init.normal_(model.weight)
        once.update(model, 4)
        for _ in range(4):
            repeated.update(model)
    assert once.updates == repeated.updates == 20
    torch.testing.assert_close(once.average["weight"], repeated.average["weight"])
