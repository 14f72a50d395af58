"""Structured uncertainty for an autoencoder that knows nothing of `sosvae`: a plain one in torch, trained on faces.

    python examples/autoencoder.py [PICTURE]

The autoencoder is fitted by squared error. Then a head learns, from its features, what the reconstruction leaves: what
is common to the whole image in a low-rank part, what is common to neighbours in a sparse precision.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import sosvae
from sosvae.evaluation.bits import per_dimension
from sosvae.tools.figures import save_images


class Autoencoder(nn.Module):
    """A stranger's model. All that is asked of it: that it returns its last features beside the mean."""

    def __init__(self) -> None:
        super().__init__()
        down = [nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 4, 2, 1)]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(32 * 4 * 3, 32))
        up = [nn.Linear(32, 32 * 4 * 3), nn.Unflatten(1, (32, 4, 3))]
        for inputs, outputs in ((32, 32), (32, 16), (16, 16)):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        self.decoder, self.last = nn.Sequential(*up), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.decoder(self.encoder(x))
        return self.last(features), features


def main(picture: str = "autoencoder.png") -> dict[str, float]:
    torch.manual_seed(0)
    faces = sosvae.load(sosvae.DataConfig(source="faces", height=32, width=24, validation=0.2))
    train, test = faces.first("train", 1000), faces.first("test", 1000)

    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for x in train[torch.randint(len(train), (200, 32))]:
        loss = nn.functional.mse_loss(model(x)[0], x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    batches = [(x, x) for x in train[torch.randperm(len(train))].split(16)]
    uncertainty = sosvae.StructuredUncertainty(model, train[:1])
    uncertainty.fit(batches, steps=150)

    with torch.no_grad():
        x = test + (torch.rand_like(test) - 0.5) / 255
        p = uncertainty(test)
        variance = (train - model(train)[0]).square().mean()
        plain = sosvae.PixelwiseNormal(p.loc, variance)
        bits = {
            "one variance for all pixels": float(per_dimension(plain.log_prob(x.flatten(1)), x[0].numel()).mean()),
            "global-local": float(per_dimension(p.log_prob(x.flatten(1)), x[0].numel()).mean()),
        }
        for name, value in bits.items():
            print(f"{name:30}{value:6.2f} bits per dimension of the likelihood, on people it has not seen")
        few = uncertainty(test[:6])
        rows = [("data", test[:6]), ("mean", uncertainty.unflatten(few.loc))]
        rows += [("sample", uncertainty.unflatten(few.rsample())) for _ in range(2)]
        rows += [("global part", uncertainty.unflatten(few.rsample(temperature=(1, 0))))]
        print(save_images(rows, Path(picture)))
    return bits


if __name__ == "__main__":
    assert all(math.isfinite(value) for value in main(*sys.argv[1:]).values())
