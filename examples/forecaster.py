"""A forecaster of many series at once: a recurrent network that predicts their joint distribution at the next step.

Replaced: independent normals, one for each series, by `LowRankMultivariateNormal` and `LowRankMultivariateStudentT`.
Gained: nats on steps that were held out, and intervals of the sum over all series (a portfolio) that hold what they
promise; independent series promise that the sum is nearly certain. Data: series that share three hidden drivers with
volatile days, made here.
"""

import time
from statistics import median

import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus

from lowrank_mvn import LowRankMultivariateNormal, LowRankMultivariateStudentT

SERIES, RANK, LENGTH, HELD_OUT, STEPS, WINDOW = 200, 5, 1200, 300, 120, 50


def returns():
    """[LENGTH, SERIES]: drivers with loadings, noise of each series, and days on which everything moves more."""
    drivers = torch.randn(LENGTH, 3) @ (0.8 * torch.randn(3, SERIES))
    volatility = torch.distributions.Chi2(4.0).sample((LENGTH, 1)).div(4).rsqrt()
    noise = torch.randn(LENGTH, SERIES) * (0.5 + torch.rand(SERIES))
    return 0.1 * volatility * (drivers + noise)


class Forecaster(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.state = kind, nn.GRU(SERIES, 32, batch_first=True)
        self.mean, self.scale = nn.Linear(32, SERIES), nn.Linear(32, SERIES)
        self.factor, self.df = nn.Linear(32, SERIES * RANK), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        """The distribution of each next step, batch shape [B, T]."""
        h, _ = self.state(x)
        mean, d = self.mean(h), 0.1 * softplus(self.scale(h)).square() + 1e-5
        if self.kind == "independent":
            return Independent(Normal(mean, d.sqrt()), 1)
        P = 0.3 * self.factor(h).unflatten(-1, (SERIES, RANK))
        if self.kind == "low-rank normal":
            return LowRankMultivariateNormal(mean, P, d)
        return LowRankMultivariateStudentT(1 + softplus(self.df), mean, P, d)


torch.manual_seed(0)
x = returns()
train, test = x[:-HELD_OUT], x[-HELD_OUT - 1 :]
for kind in ("independent", "low-rank normal", "low-rank Student's t"):
    torch.manual_seed(1)
    forecaster = Forecaster(kind)
    optimiser, times = torch.optim.Adam(forecaster.parameters(), 1e-2), []
    for _ in range(STEPS):
        start = time.perf_counter()
        begin = torch.randint(len(train) - WINDOW - 1, (8,)).tolist()
        window = torch.stack([train[b : b + WINDOW + 1] for b in begin])
        optimiser.zero_grad()
        loss = -forecaster(window[:, :-1]).log_prob(window[:, 1:]).mean()
        loss.backward()
        optimiser.step()
        times.append(time.perf_counter() - start)
    with torch.no_grad():
        p, truth = forecaster(test[None, :-1]), test[None, 1:]
        nats = p.log_prob(truth).mean() / SERIES
        sums = p.sample((500,)).sum(-1)
        low, high = sums.quantile(0.05, 0), sums.quantile(0.95, 0)
        covered = ((low < truth.sum(-1)) & (truth.sum(-1) < high)).float().mean()
    print(f"{kind}: held out {nats:.3f} nats a series; 90 % intervals of the sum hold {covered:.0%};", end=" ")
    print(f"{median(times) * 1e3:.0f} ms a step")
