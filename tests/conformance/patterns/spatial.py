"""Convolutions with every option, and what usually comes after them."""

import torch
from torch import nn

from tests.conformance.patterns import N, Parts, Setup, of_rows, pattern, plain, rows

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def padded(dimensions: int, mode: str, padding: int | str = 1, kernel: int = 3) -> Setup:
    options = {"padding": padding, "padding_mode": mode}
    net = nn.Sequential(CONVOLUTIONS[dimensions](2, 3, kernel, **options), nn.Tanh(), nn.Flatten())
    return Setup(net, rows(2, *(5, 4, 4)[:dimensions]), plain)


@pattern()
def padding_reflected_1d():
    return padded(1, "reflect", 2)


@pattern()
def padding_replicated_1d():
    return padded(1, "replicate")


@pattern()
def padding_circular_1d():
    return padded(1, "circular")


@pattern()
def padding_reflected_2d():
    return padded(2, "reflect")


@pattern()
def padding_replicated_2d():
    return padded(2, "replicate")


@pattern()
def padding_circular_2d():
    return padded(2, "circular")


@pattern()
def padding_replicated_3d():
    return padded(3, "replicate")


@pattern()
def padding_circular_3d():
    return padded(3, "circular")


@pattern()
def padding_reflected_3d():
    return padded(3, "reflect")


@pattern()
def padding_same_with_an_even_kernel_1d():
    return padded(1, "zeros", "same", kernel=4)


@pattern()
def padding_same_with_an_even_kernel_2d():
    return padded(2, "zeros", "same", kernel=2)


@pattern()
def padding_same_with_an_even_kernel_3d():
    return padded(3, "zeros", "same", kernel=2)


@pattern()
def padding_same_circular_with_an_even_kernel():
    return padded(2, "circular", "same", kernel=2)


@pattern()
def padding_valid():
    return padded(2, "zeros", "valid")


@pattern()
def grouped_strided_dilated():
    net = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    return Setup(net, rows(4, 7, 6), plain)


@pattern()
def depthwise_separable():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    return Setup(net, rows(3, 6, 6), plain)


@pattern()
def stride_that_leaves_a_rest():
    return Setup(nn.Conv2d(2, 3, 3, stride=3), rows(2, 8, 7), plain)


@pattern()
def patches_of_an_image():
    net = Parts(patch=nn.Conv2d(3, 4, 4, stride=4), norm=nn.LayerNorm(4))
    return Setup(net, rows(3, 8, 8), of_rows(lambda m, x: m.norm(m.patch(x).flatten(2).transpose(1, 2))))


@pattern()
def convolution_wide_enough_for_products_between_positions():
    # Few positions and many channels: the cheapest way to the norms is another one here.
    return Setup(nn.Conv2d(16, 16, 3, groups=2, padding=1), rows(16, 2, 2), plain)


@pattern()
def positions_that_cancel_in_a_wide_layer():
    # Inputs far from zero whose gradients add up to zero over the positions, as instance norms make them: what is
    # left is a small difference of large products, and float32 has few digits to spare.
    net = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.InstanceNorm2d(64))
    return Setup(net, 100 + rows(64, 4, 4), plain)


@pattern()
def convolution_too_wide_for_one_grouped_call():
    return Setup(nn.Conv1d(80, 180, 3), 0.1 * rows(80, 140), plain)


@pattern()
def transposed_convolution():
    net = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    return Setup(net, rows(4, 4, 3), plain)


@pattern()
def transposed_convolution_1d_dilated():
    return Setup(nn.ConvTranspose1d(2, 3, 3, dilation=2), rows(2, 5), plain)


@pattern()
def transposed_convolution_3d():
    return Setup(nn.ConvTranspose3d(2, 3, 2), rows(2, 3, 3, 3), plain)


@pattern()
def transposed_convolution_with_an_output_size():
    net = Parts(up=nn.ConvTranspose2d(2, 3, 3, stride=2))
    return Setup(net, rows(2, 4, 4), of_rows(lambda m, x: m.up(x, output_size=[10, 10])))


@pattern()
def channels_last():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    return Setup(net, rows(3, 6, 6).to(memory_format=torch.channels_last), plain)


@pattern()
def frames_folded_into_the_batch():
    net = Parts(conv=nn.Conv2d(2, 3, 3), head=nn.Linear(3 * 4, 2))

    def forward(net, video):
        frames = net.conv(video.flatten(0, 1)).tanh().flatten(1)
        return net.head(frames.unflatten(0, video.shape[:2])).mean(1)

    return Setup(net, rows(3, 2, 4, 4), of_rows(forward))


@pattern()
def convolution_of_unbatched_images():
    net = Parts(conv=nn.Conv2d(2, 3, 3))
    return Setup(net, rows(2, 4, 4), of_rows(lambda m, x: torch.stack([m.conv(image) for image in x])))


@pattern()
def convolution_over_the_batch_as_channels():
    # The batch becomes groups of one image, as in modulated convolutions; the kernel is repeated for each.
    def forward(net, x):
        weight = net.conv.weight.repeat(len(x), 1, 1, 1)
        out = torch.nn.functional.conv2d(x.flatten(0, 1)[None], weight, groups=len(x))
        return out.view(len(x), 3, 2, 2)

    return Setup(Parts(conv=nn.Conv2d(2, 3, 3, bias=False)), rows(2, 4, 4), of_rows(forward))


@pattern()
def slopes_of_each_channel():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU(3), nn.Flatten(), nn.Linear(12, 2), nn.PReLU())
    return Setup(net, rows(2, 4, 4), plain)


@pattern()
def inplace_relu_after_a_convolution():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.ReLU(inplace=True))
    net.append(nn.Flatten()).append(nn.Linear(2, 3))
    return Setup(net, rows(2, 4, 4), plain)


@pattern()
def upsampling_decoder_with_skips():
    net = Parts(down=nn.Conv2d(2, 3, 3, stride=2, padding=1), up=nn.Conv2d(5, 2, 3, padding=1))

    def forward(net, x):
        coarse = net.down(x).relu_()
        return net.up(torch.cat([torch.nn.functional.interpolate(coarse, scale_factor=2.0), x], 1))

    return Setup(net, rows(2, 4, 4), of_rows(forward))


@pattern()
def ragged_crops_of_one_size_for_each_example():
    # As detectors do: boxes of all images in one tensor, images in another.
    net = Parts(conv=nn.Conv2d(1, 2, 3), head=nn.Linear(8, 2))

    def forward(net, images):
        crops = torch.cat([images[:, :, :4, :4], images[:, :, 1:, 1:]])
        return net.head(net.conv(crops).tanh().flatten(1)).view(2, len(images), 2).transpose(0, 1)

    return Setup(net, rows(1, 5, 5), of_rows(forward), examples=N)
