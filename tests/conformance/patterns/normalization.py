"""Normalisation: of each example alone it is measured, of the batch it is refused."""

import torch
from torch import nn

from tests.conformance.patterns import MIXES, Parts, Setup, T, of_rows, pattern, plain, rows


def perturbed(net: nn.Module) -> nn.Module:
    """Scales of one and shifts of zero would hide errors."""
    with torch.no_grad():
        for held in net.parameters():
            held.add_(0.3 * torch.randn_like(held))
        for name, kept in net.named_buffers():
            if "running" in name:
                kept.add_(torch.rand_like(kept))
    return net


@pattern()
def layer_norm_without_bias():
    return Setup(perturbed(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, bias=False))), rows(T, 4), plain)


@pattern()
def layer_norm_without_parameters():
    return Setup(perturbed(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False))), rows(4), plain)


@pattern()
def layer_norm_over_several_dimensions():
    return Setup(perturbed(nn.Sequential(nn.LayerNorm((3, 4)), nn.Tanh(), nn.Linear(4, 2))), rows(2, 3, 4), plain)


@pattern()
def layer_norm_over_all_but_the_batch():
    return Setup(perturbed(nn.LayerNorm((2, 3, 4))), rows(2, 3, 4), plain)


@pattern()
def layer_norm_of_channels_last():
    net = perturbed(Parts(conv=nn.Conv2d(2, 3, 3), norm=nn.LayerNorm(3)))
    return Setup(net, rows(2, 5, 5), of_rows(lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1))))


@pattern()
def rms_norm():
    return Setup(perturbed(nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5))), rows(T, 4), plain)


@pattern()
def rms_norm_with_its_own_eps():
    return Setup(perturbed(nn.RMSNorm((T, 4), eps=1e-2)), rows(T, 4), plain)


@pattern()
def group_norm():
    return Setup(perturbed(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())), rows(2, 5, 5), plain)


@pattern()
def group_norm_without_parameters():
    return Setup(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, affine=False)), rows(2, 5, 5), plain)


@pattern()
def group_norm_of_vectors():
    return Setup(perturbed(nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(3, 6))), rows(4), plain)


@pattern()
def instance_norm_in_training():
    return Setup(perturbed(nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True))), rows(2, 6), plain)


def tracking() -> nn.Module:
    return perturbed(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Tanh())
    )


@pattern()
def instance_norm_that_tracks_in_training():
    return Setup(tracking(), rows(2, 5, 5), plain)


@pattern()
def instance_norm_that_tracks_in_eval():
    return Setup(tracking().eval(), rows(2, 5, 5), plain)


@pattern(refused=MIXES)
def batch_norm_in_training():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    return Setup(perturbed(net), rows(2, 5, 5), plain)


@pattern(refused=MIXES + "|part of its batch")
def batch_norm_of_vectors_in_training():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        alone = len(batch) == 1  # one vector has no variance: torch refuses it
        return plain(module, torch.cat([batch, -batch]) if alone else batch)

    return Setup(perturbed(net), rows(4), loss)


@pattern()
def batch_norm_in_eval():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    return Setup(perturbed(net).eval(), rows(2, 5, 5), plain)


@pattern()
def frozen_batch_norm_in_a_network_in_training():
    net = perturbed(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    net[1].eval().requires_grad_(False)
    return Setup(net, rows(4), plain)


@pattern()
def batch_norm_of_sequences_in_eval():
    return Setup(perturbed(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3))).eval(), rows(2, 6), plain)


@pattern(refused=MIXES)
def batch_norm_that_does_not_track_in_eval():
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh())
    return Setup(perturbed(net).eval(), rows(2, 6), plain)


@pattern(refused=MIXES)
def batch_statistics_by_hand():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    return Setup(net, rows(4), of_rows(lambda m, x: m[1]((m[0](x) - m[0](x).mean(0)).tanh())))


@pattern()
def local_response_norm_and_unit_length():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LocalResponseNorm(2), nn.Flatten(), nn.Linear(36, 3))
    return Setup(net, rows(2, 5, 5), of_rows(lambda m, x: nn.functional.normalize(m(x), dim=1)))


@pattern()
def norm_used_twice():
    net = perturbed(Parts(norm=nn.LayerNorm(4), layer=nn.Linear(4, 4)))
    return Setup(net, rows(T, 4), of_rows(lambda m, x: m.norm(x + m.layer(m.norm(x)).tanh())))
