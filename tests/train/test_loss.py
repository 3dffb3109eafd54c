import torch

from ip2p.training.loss import (
    add_noise,
    change_weights,
    noise_loss,
    null_conditions,
    prediction_target,
    random_timesteps,
    scaled_linear_alpha_bar,
    snr_weight,
    velocity,
)


def test_one_draw_drops_text_image_and_both_in_5_percent_each():
    draw = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    text, image = null_conditions(draw)
    shares = [(text & ~image), (text & image), (~text & image), (~text & ~image)]
    for share, percent in zip(shares, (5, 5, 5, 85), strict=True):
        assert abs(100 * share.float().mean() - percent) < 0.3


def test_the_dropout_thresholds_match_the_released_code():
    text, image = null_conditions(torch.tensor([0.0, 0.05, 0.0999, 0.1, 0.1499, 0.15, 0.9]))
    assert text.tolist() == [True, True, True, False, False, False, False]
    assert image.tolist() == [False, True, True, True, True, False, False]


def test_alpha_bar_matches_diffusers_schedule():
    from diffusers import DDPMScheduler

    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(scaled_linear_alpha_bar(), oracle.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_add_noise_matches_diffusers():
    from diffusers import DDPMScheduler

    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([3, 500, 999])
    ours = add_noise(clean, noise, oracle.alphas_cumprod[t])
    torch.testing.assert_close(ours, oracle.add_noise(clean, noise, t))


def test_snr_weight_clamps_the_weight_of_x0():
    alpha_bar = scaled_linear_alpha_bar()
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr_weight(alpha_bar, (0.25, 5.0)) * snr
    assert weight.min() >= 0.25 - 1e-6 and weight.max() <= 5.0 + 1e-5
    middle = (snr > 0.25) & (snr < 5)
    torch.testing.assert_close(weight[middle], snr[middle])


def test_the_loss_without_snr_limits_is_the_mean_squared_error():
    predicted, noise = torch.randn(2, 5, 4, 8, 8)
    plain = noise_loss(predicted, noise, snr_weight(torch.rand(5), None))
    torch.testing.assert_close(plain, torch.nn.functional.mse_loss(predicted, noise))


def test_cell_weights_increase_the_loss_of_their_cells():
    predicted, noise = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    predicted[..., 0, 0] = 1
    cells = torch.ones(1, 1, 2, 2)
    plain = noise_loss(predicted, noise, torch.ones(1), cells)
    cells[..., 0, 0] = 4
    assert noise_loss(predicted, noise, torch.ones(1), cells) > 2 * plain


def test_velocity_matches_diffusers():
    from diffusers import DDPMScheduler

    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([3, 500, 999])
    ours = velocity(clean, noise, oracle.alphas_cumprod[t])
    torch.testing.assert_close(ours, oracle.get_velocity(clean, noise, t))


def test_the_same_x0_error_costs_the_same_for_every_prediction_type():
    """A wrong x0 implies a wrong noise and a wrong velocity; weighted, all three cost the same."""
    alpha_bar = scaled_linear_alpha_bar()[[50, 400, 900]]
    a = alpha_bar[:, None, None, None]
    clean, noise, off = torch.randn(3, 3, 4, 8, 8)
    noisy = add_noise(clean, noise, alpha_bar)
    losses = []
    for prediction in ("epsilon", "v_prediction"):
        weight = snr_weight(alpha_bar, (0.25, 5.0), prediction)
        wrong = (noisy - a.sqrt() * (clean + off)) / (1 - a).sqrt()
        if prediction == "epsilon":
            losses.append(noise_loss(wrong, noise, weight))
        else:
            right = velocity(clean, noise, alpha_bar)
            losses.append(noise_loss(velocity(clean + off, wrong, alpha_bar), right, weight))
    weight = snr_weight(alpha_bar, (0.25, 5.0), "sample")
    losses.append(noise_loss(clean + off, prediction_target("sample", clean, noise, alpha_bar), weight))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=1e-5)


def test_power_one_draws_timesteps_uniformly_and_a_smaller_one_favors_noise():
    drawn = {
        p: random_timesteps(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), p)
        for p in (1.0, 0.6)
    }
    for timesteps in drawn.values():
        assert timesteps.min() >= 0 and timesteps.max() == 999
    # The mean of u^p is 1 / (p + 1), and P(u^p < 0.2) is 0.2^(1/p).
    for power, mean, early in ((1.0, 500, 0.2), (0.6, 625, 0.2 ** (1 / 0.6))):
        assert abs(drawn[power].float().mean() - mean) < 3
        assert abs((drawn[power] < 200).float().mean() - early) < 0.005


def test_changed_cells_get_their_share_of_the_weight_up_to_a_limit():
    changed = torch.zeros(3, 1, 16, 16)
    changed[0, 0, 0, :16] = 1  # 16 of 256: each weighs 1 + 0.5 * 256 / 16
    changed[1, 0, 0, :2] = 1  # 2 of 256: capped
    weights = change_weights(changed, share=0.5, most=24.0)
    assert weights[0, 0, 0, 0] == 9 and weights[0, 0, 1, 0] == 1
    assert weights[1, 0, 0, 0] == 25
    assert (weights[2] == 1).all()
    added = weights[0].sum() - 256
    assert added == 128  # half of the weight of all cells
