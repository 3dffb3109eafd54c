import pytest
import torch
import torch.nn.functional as F

from ip2p.training.storybook.heads import Heads, class_loss


def test_class_loss_matches_the_mean_of_cross_entropy_per_field():
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


@pytest.mark.parametrize("shape", [(5,), (5, 6)])
def test_heads_keep_the_leading_dimensions(shape):
    assert Heads(7, (3, 4))(torch.randn(*shape, 7)).shape == (*shape, 7)
