import pytest
import torch
import torch.nn.functional as F

from ip2p.training.recognition import Heads, Recognition, SceneHead, class_loss


def test_class_loss_is_the_mean_of_the_fields_cross_entropies():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3], [2, -100], [3, 4], [1, 0], [0, -100], [2, 1]])
    first = F.cross_entropy(logits[:, :4], labels[:, 0])
    second = F.cross_entropy(logits[:, 4:], labels[:, 1], ignore_index=-100)
    torch.testing.assert_close(class_loss(logits, labels, (4, 5)), (first + second) / 2)


def test_fields_without_any_label_cost_nothing():
    logits = torch.randn(3, 9, requires_grad=True)
    nothing = torch.full((3, 2), -100)
    loss = class_loss(logits, nothing, (4, 5))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_a_scene_head_reads_a_thing_from_where_it_stands():
    """A mark in one corner of the features is learnt as the class of that spot and of no other."""
    torch.manual_seed(0)
    head = SceneHead(16, (3, 2), (2,))
    features, labels = 0.1 * torch.randn(64, 16, 8, 8), torch.zeros(64, 13, dtype=torch.long)
    labels[:, 1:12:2] = -100
    spots = torch.arange(64) % 6
    for row, spot in enumerate(spots.tolist()):
        y, x = (0 if spot < 3 else 4), (0, 3, 6)[spot % 3]
        features[row, row % 2, y : y + 4, x : x + 2] += 3
        labels[row, 2 * spot] = 1 + row % 2
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        loss, right = head.loss(features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right == 1.0 and loss < 0.1


@pytest.mark.parametrize("shape", [(5,), (5, 6)])
def test_heads_keep_the_leading_dimensions(shape):
    assert Heads(7, (3, 4))(torch.randn(*shape, 7)).shape == (*shape, 7)


def test_only_what_the_conditions_tell_is_asked():
    from ip2p.training.objective import Draws, EditBatch

    torch.manual_seed(0)
    recognition = Recognition(32, 8, (3, 2), (2,), (4, 2), weight=0.5)
    for name in ("before", "after"):
        recognition._features[name] = torch.randn(4, 32, 4, 4)
    context = torch.randn(4, 5, 8)
    none = torch.zeros(4, dtype=torch.bool)
    # Row 0 shows all; row 1 lost its text, row 2 its image; row 3 has a caption and no image.
    draws = Draws(
        posterior=torch.zeros(4, 4, 4, 4),
        noise=torch.zeros(4, 4, 4, 4),
        timesteps=torch.zeros(4, dtype=torch.long),
        text_null=torch.tensor([False, True, False, False]),
        image_null=torch.tensor([False, False, True, True]),
        caption_only=torch.tensor([False, False, False, True]),
    )
    labels = {
        "before": torch.zeros(4, 6 * 2 + 1, dtype=torch.long),
        "after": torch.zeros(4, 6 * 2 + 1, dtype=torch.long),
        "edit": torch.zeros(4, 2, dtype=torch.long),
    }

    def loss(part: str | None = None, row: int = 0) -> float:
        told = {key: value.clone() for key, value in labels.items()}
        if part:
            told[part][row] = 1
        zeros = torch.zeros(4, 4, 4, 4)
        batch = EditBatch(
            before=zeros, mean=zeros, std=zeros, draws=draws, text=none, ids="abcd", labels=told
        )
        return float(recognition.loss(batch, context)[0].detach())

    counted = {part: [abs(loss(part, row) - loss()) > 1e-6 for row in range(4)] for part in labels}
    assert counted == {
        "before": [True, True, False, False],
        "after": [True, False, False, True],
        "edit": [True, False, True, False],
    }
