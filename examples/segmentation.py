"""A stochastic segmentation network: a low-rank normal over the logits of a whole label map (Monteiro et al. 2020).

Replaced: the factor that such networks make by a convolution for `torch.distributions.LowRankMultivariateNormal`, by a
`LinearFactor` of the same features; and, to see what the factor is for, independent logits. Gained: less time, no
failure where torch's matrix is not positive definite in float32 (on some machines), and label maps that are one
annotator's. Data: discs with a soft edge, whose annotators disagree about the radius.
"""

import math
import time
from statistics import median

import torch
import torch.distributions as td
from torch import nn

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal

SIZE, FEATURES, RANK, STEPS, BATCH, SAMPLES = 64, 16, 10, 60, 8, 20
GRID = torch.stack(torch.meshgrid(*[torch.arange(SIZE).float()] * 2, indexing="ij"))


def annotated(count):
    """Images [count, 1, SIZE, SIZE] and one annotator's label map of each [count, SIZE²]."""
    centre, radius = 24 + 16 * torch.rand(count, 2, 1, 1), 8 + 8 * torch.rand(count, 1, 1)
    distance = (GRID - centre).square().sum(1).sqrt()
    image = torch.sigmoid((radius - distance) / 4) + 0.05 * torch.randn(count, SIZE, SIZE)
    opinion = radius * (1 + 0.25 * torch.randn(count, 1, 1))
    return image.unsqueeze(1), (distance < opinion).float().flatten(1)


class Network(nn.Module):
    def __init__(self, kind):
        super().__init__()
        layers = [nn.Conv2d(1, FEATURES, 5, 1, 2), nn.ReLU(), nn.Conv2d(FEATURES, FEATURES, 5, 2, 2), nn.ReLU()]
        layers += [nn.Conv2d(FEATURES, FEATURES, 5, 1, 8, 4), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")]
        self.kind, self.features = kind, nn.Sequential(*layers)
        self.mean, self.variance, self.factor = (nn.Conv2d(FEATURES, n, 1) for n in (1, 1, RANK))

    def forward(self, image):
        F = self.features(image)
        d = nn.functional.softplus(self.variance(F).flatten(1)) + 1e-3
        if self.kind == "torch's class":
            return td.LowRankMultivariateNormal(self.mean(F).flatten(1), self.factor(F).flatten(2).mT, d)
        mean = LinearMean(F, self.mean.weight, self.mean.bias)
        if self.kind == "independent logits":
            return td.Independent(td.Normal(mean.materialise(), d.sqrt()), 1)
        return LowRankMultivariateNormal(mean, LinearFactor(F, self.factor.weight, self.factor.bias, channels=1), d)


def log_likelihood(logits, labels):
    """log E p(labels | logits), by Monte Carlo."""
    per_sample = td.Bernoulli(logits=logits.rsample((SAMPLES,))).log_prob(labels).sum(-1)
    return per_sample.logsumexp(0) - math.log(SAMPLES)


torch.manual_seed(0)
test_images, test_labels = annotated(64)
for kind in ("torch's class", "lowrank_mvn", "independent logits"):
    torch.manual_seed(1)
    network, times = Network(kind), []
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    try:
        for _ in range(STEPS):
            (image, labels), start = annotated(BATCH), time.perf_counter()
            optimiser.zero_grad()
            loss = -log_likelihood(network(image), labels).mean()
            loss.backward()
            optimiser.step()
            times.append(time.perf_counter() - start)
        with torch.no_grad():
            logits = network(test_images)
            nats, areas = log_likelihood(logits, test_labels).mean(), (logits.sample((SAMPLES,)) > 0).float().sum(-1)
        spread = (areas.std(0) / areas.mean(0)).mean()
        found = f"held out {nats:.0f} nats; areas of samples vary by {spread:.0%} (annotators: 50 %)"
    except torch.linalg.LinAlgError:  # the textbook's capacitance matrix in float32
        found = f"fails after {len(times)} steps, its matrix is not positive definite"
    print(f"{kind}: {found}; {median(times) * 1e3:.0f} ms a step")
