"""Structured uncertainty for a model that knows nothing of `sosvae`: scikit-learn's PCA of faces, as a decoder.

    python examples/pca.py [PICTURE]

PCA reconstructs a face from 16 numbers. Replaced: one variance for all that it leaves out, by a head over features,
here the terms of the reconstruction: a low-rank part for the whole image, a sparse precision for neighbours. Gained:
bits per dimension on people that it has not seen, and samples that are faces. Any module that returns a mean and
features can stand in the place of `Decoder`, such as the decoder of an autoencoder that returns its last features too.
"""

import sys
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

import sosvae
from sosvae.evaluation.bits import per_dimension
from sosvae.tools.figures import save_images

COMPONENTS = 16


class Decoder(nn.Module):
    """Coefficients [B, 16] → the mean [B, 1, H, W], and the terms that it is the sum of, as features [B, 17, H, W]."""

    def __init__(self, pca: PCA, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("centre", torch.from_numpy(pca.mean_).view(1, 1, *shape))
        self.register_buffer("components", torch.from_numpy(pca.components_).view(1, -1, *shape))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        terms = torch.cat([self.centre.expand(len(z), -1, -1, -1), z[:, :, None, None] * self.components], 1)
        return terms.sum(1, keepdim=True), terms


def main(picture: str = "pca.png", steps: int = 80) -> dict[str, float]:
    torch.manual_seed(0)
    faces = sosvae.load(sosvae.DataConfig(source="faces", height=48, width=40, validation=0.2))
    train, test = faces.first("train", 1000), faces.first("test", 1000)
    pca = PCA(COMPONENTS).fit(train.flatten(1).numpy())
    codes, test_codes = (torch.from_numpy(pca.transform(x.flatten(1).numpy())).float() for x in (train, test))

    decoder = Decoder(pca, (48, 40)).float()
    uncertainty = sosvae.StructuredUncertainty(decoder, codes[:1])
    order = torch.randperm(len(train))
    uncertainty.fit([(codes[i], train[i]) for i in order.split(16)], steps)

    with torch.no_grad():
        p = uncertainty(test_codes)
        x = (test + (torch.rand_like(test) - 0.5) / 255).flatten(1)  # bytes, dequantised
        one_variance = sosvae.PixelwiseNormal(p.loc, (x - p.loc).square().mean())
        bits = {
            "one variance, the best for these": float(per_dimension(one_variance.log_prob(x), 48 * 40).mean()),
            "global-local": float(per_dimension(p.log_prob(x), 48 * 40).mean()),
        }
        for name, value in bits.items():
            print(f"{name:34}{value:5.2f} bits per dimension of the likelihood, on people it has not seen")
        few = uncertainty(test_codes[::6][:6])
        rows = [("data", test[::6][:6]), ("mean", uncertainty.unflatten(few.loc))]
        rows += [("sample", uncertainty.unflatten(few.rsample())) for _ in range(2)]
        rows += [("its global\npart alone", uncertainty.unflatten(few.rsample(temperature=(1, 0))))]
        print(save_images(rows, Path(picture)))
    return bits


if __name__ == "__main__":
    main(*sys.argv[1:2])
