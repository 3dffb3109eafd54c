import pytest
import torch
import torch.nn.functional as F

from ip2p.train.recognition import Heads, SceneHead, class_loss


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
