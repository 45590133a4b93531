"""The mistakes of derivations that `check_gradients` names: a table of wrong backward passes with
the words that must be said of them, and of right ones, of which nothing may be said."""

import pytest
import torch
from torch.nn import functional as F

from relu_mlp import check_gradients

ROWS, IN, HIDDEN, OUT = 12, 3, 5, 2


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


WRONG, RIGHT = {}, {}


def wrong(name, **words):
    """A case: a function that returns a loss, its inputs, and a wrong backward pass.

    Args:
        words: for each input whose gradient is wrong, words of the finding; "|" between
            alternatives.
    """

    def add(case):
        assert name not in WRONG
        WRONG[name] = case, words
        return case

    return add


def right(name):
    def add(case):
        assert name not in RIGHT
        RIGHT[name] = case
        return case

    return add


# -- Two layers ------------------------------------------------------------------

SLOPES = {
    "relu": (torch.relu, lambda z, a: (z > 0).double()),
    "sigmoid": (torch.sigmoid, lambda z, a: a * (1 - a)),
    "tanh": (torch.tanh, lambda z, a: 1 - a**2),
    "identity": (lambda z: z, lambda z, a: torch.ones_like(z)),
}


class Net:
    """y = phi(act(x w1ᵀ + b1) w2ᵀ + b2), loss = sum (y - t)², and its derivation in steps.

    Every step of the derivation can be replaced by a function of all that was computed before.
    """

    def __init__(self, hidden="relu", output="identity", sizes=(IN, HIDDEN, OUT), **mistakes):
        self.x, self.t = draw(ROWS, sizes[0]), draw(ROWS, sizes[2])
        self.act, self.slope = SLOPES[hidden]
        self.phi, self.output_slope = SLOPES[output]
        self.inputs = {
            "w1": draw(sizes[1], sizes[0]),
            "b1": draw(sizes[1]),
            "w2": draw(sizes[2], sizes[1]),
            "b2": draw(sizes[2]),
        }
        self.mistakes = mistakes

    def loss(self, w1, b1, w2, b2):
        a1 = self.act(self.x @ w1.T + b1)
        return (self.phi(a1 @ w2.T + b2) - self.t).square().sum()

    def backward(self, w1, b1, w2, b2):
        v = {"x": self.x, "t": self.t, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        steps = {
            "z1": lambda v: v["x"] @ w1.T + b1,
            "a1": lambda v: self.act(v["z1"]),
            "z2": lambda v: v["a1"] @ w2.T + b2,
            "y": lambda v: self.phi(v["z2"]),
            "g": lambda v: 2 * (v["y"] - v["t"]),
            "d2": lambda v: v["g"] * self.output_slope(v["z2"], v["y"]),
            "gw2": lambda v: v["d2"].T @ v["a1"],
            "gb2": lambda v: v["d2"].sum(0),
            "ga1": lambda v: v["d2"] @ w2,
            "d1": lambda v: v["ga1"] * self.slope(v["z1"], v["a1"]),
            "gw1": lambda v: v["d1"].T @ v["x"],
            "gb1": lambda v: v["d1"].sum(0),
        }
        for name, step in steps.items():
            v[name] = self.mistakes.get(name, step)(v)
        return {name: v[f"g{name}"] for name in ("w1", "b1", "w2", "b2")}

    def case(self):
        return self.loss, self.inputs, self.backward


def net(name, words, options=None, **mistakes):
    wrong(name, **words)(lambda: Net(**(options or {}), **mistakes).case())


def below(*words):
    """The words for both parameters of the first layer."""
    return {"w1": words, "b1": words}


def everywhere(*words):
    return dict.fromkeys(["w1", "b1", "w2", "b2"], words)


SQUARE = {"sizes": (4, 4, 4)}
SIGMOID, TANH = {"hidden": "sigmoid"}, {"hidden": "tanh"}
SIGMOID_OUT, TANH_OUT = {"output": "sigmoid"}, {"output": "tanh"}
ONE_OUT = {"sizes": (IN, HIDDEN, 1)}

# Masks.
net("no mask", below("relu", "left out"), d1=lambda v: v["ga1"])
net(
    "mask before the bias",
    below("relu", "x @ w1.T"),
    d1=lambda v: v["ga1"] * (v["x"] @ v["w1"].T > 0),
)
net("mask the other way round", below("relu", "inverted"), d1=lambda v: v["ga1"] * (v["z1"] <= 0))
net("mask of the gradient", below("relu", "gradient"), d1=lambda v: v["ga1"] * (v["ga1"] > 0))
net("times a instead of the mask", below("relu", "multiplied"), d1=lambda v: v["ga1"] * v["a1"])
net("mask of x", below("relu", "x"), SQUARE, d1=lambda v: v["ga1"] * (v["x"] > 0))
net("mask of the output", below("relu"), SQUARE, d1=lambda v: v["ga1"] * (v["z2"] > 0))
net("mask for the weight alone", {"b1": ("relu", "left out")}, gb1=lambda v: v["ga1"].sum(0))
net("leaky mask", below("relu", "0.01"), d1=lambda v: v["ga1"] * torch.where(v["z1"] > 0, 1, 0.01))
# Activations and pre-activations.
net("z in place of a", {"w2": ("x @ w1.T + b1", "relu")}, gw2=lambda v: v["d2"].T @ v["z1"])
net(
    "z in place of a, tanh",
    {"w2": ("x @ w1.T + b1", "tanh")},
    TANH,
    gw2=lambda v: v["d2"].T @ v["z1"],
)
net("a in place of x", {"w1": ("in place of x",)}, SQUARE, gw1=lambda v: v["d1"].T @ v["a1"])
net("activation left out forwards", everywhere("relu", "left out"), a1=lambda v: v["z1"])
# Biases.
net("b1 forgotten", everywhere("b1"), z1=lambda v: v["x"] @ v["w1"].T)
net("b2 forgotten", everywhere("b2"), z2=lambda v: v["a1"] @ v["w2"].T)
net("target forgotten", everywhere("- t|target"), g=lambda v: 2 * v["y"])
# Factors.
net("2 forgotten", everywhere("1/2 of"), g=lambda v: v["y"] - v["t"])
net("sign", everywhere("minus"), g=lambda v: 2 * (v["t"] - v["y"]))
net("divided by the rows", {"b1": ("1/12", "rows")}, gb1=lambda v: v["d1"].mean(0))
net("times the rows", {"w2": ("12 times", "rows")}, gw2=lambda v: ROWS * v["d2"].T @ v["a1"])
net("mean over all", everywhere("1/24"), g=lambda v: 2 * (v["y"] - v["t"]) / 24)
net("factor in one layer", below("3 times"), d1=lambda v: 3 * v["ga1"] * (v["z1"] > 0))
# Shapes, sums.
net("transposed", {"w2": ("transpose",)}, gw2=lambda v: v["a1"].T @ v["d2"])
net("transposed, square", {"w1": ("transpose",)}, SQUARE, gw1=lambda v: v["x"].T @ v["d1"])
net("w2 transposed", below("w2", "transpose"), SQUARE, ga1=lambda v: v["d2"] @ v["w2"].T)
net("sum over everything", {"b1": ("sum over all",)}, gb1=lambda v: v["d1"].sum())
net("sum, expanded", {"b1": ("sum over all",)}, gb1=lambda v: v["d1"].sum().expand(HIDDEN))
net("not summed", {"b1": ("sum", "row")}, gb1=lambda v: v["d1"])
net("other axis", {"b1": ("sum", "axis")}, gb1=lambda v: v["d1"].sum(1))
net("keepdim", {"b1": ("reshape",)}, gb1=lambda v: v["d1"].sum(0, keepdim=True))
net("a column", {"b2": ("reshape",)}, gb2=lambda v: v["d2"].sum(0)[:, None])
# Rows.
net("last row left out", {"b1": ("row", "11", "left out")}, gb1=lambda v: v["d1"][:-1].sum(0))
net(
    "last row left out everywhere",
    everywhere("row", "11", "left out"),
    g=lambda v: 2 * (v["y"] - v["t"]) * (torch.arange(ROWS) < 11)[:, None],
)
net(
    "overwritten",
    {"w2": ("row", "only|alone", "+=")},
    gw2=lambda v: torch.outer(v["d2"][-1], v["a1"][-1]),
)
net(
    "a row twice",
    {"w1": ("row 0", "twice")},
    gw1=lambda v: v["d1"].T @ v["x"] + torch.outer(v["d1"][0], v["x"][0]),
)
net("half of the rows", {"w1": ("rows",)}, gw1=lambda v: v["d1"][:6].T @ v["x"][:6])
# Slopes of activations.
net(
    "sigmoid: z (1 - z)",
    everywhere("sigmoid") | {},
    SIGMOID_OUT,
    d2=lambda v: v["g"] * v["z2"] * (1 - v["z2"]),
)
net("sigmoid: slope left out", everywhere("sigmoid", "left out"), SIGMOID_OUT, d2=lambda v: v["g"])
net(
    "sigmoid: slope twice",
    everywhere("sigmoid", "twice"),
    SIGMOID_OUT,
    d2=lambda v: v["g"] * (v["y"] * (1 - v["y"])) ** 2,
)
net("sigmoid: y", everywhere("sigmoid"), SIGMOID_OUT, d2=lambda v: v["g"] * v["y"])
net("sigmoid: 1 - y", everywhere("sigmoid"), SIGMOID_OUT, d2=lambda v: v["g"] * (1 - v["y"]))
net(
    "sigmoid: of y",
    everywhere("sigmoid", "argument|in place"),
    SIGMOID_OUT,
    d2=lambda v: v["g"] * torch.sigmoid(v["y"]) * (1 - torch.sigmoid(v["y"])),
)
net("tanh: 1 - y", everywhere("tanh"), TANH_OUT, d2=lambda v: v["g"] * (1 - v["y"]))
net("tanh: 1 - z²", everywhere("tanh"), TANH_OUT, d2=lambda v: v["g"] * (1 - v["z2"] ** 2))
net("tanh: y (1 - y)", everywhere("tanh"), TANH_OUT, d2=lambda v: v["g"] * v["y"] * (1 - v["y"]))
net("hidden tanh: 1 - y", below("tanh"), TANH, d1=lambda v: v["ga1"] * (1 - v["a1"]))
net(
    "hidden sigmoid: z (1 - z)",
    below("sigmoid"),
    SIGMOID,
    d1=lambda v: v["ga1"] * v["z1"] * (1 - v["z1"]),
)
net("hidden sigmoid: left out", below("sigmoid", "left out"), SIGMOID, d1=lambda v: v["ga1"])
net("hidden slope in d2's place", {**below("tanh")}, TANH, d1=lambda v: v["ga1"] * v["a1"] ** 2)
# Two at a time.
net(
    "mask and mean",
    {"w1": ("relu", "left out"), "b1": ("1/12", "relu")},
    d1=lambda v: v["ga1"],
    gb1=lambda v: v["d1"].mean(0),
)
net(
    "2 forgotten, and no mask",
    {**everywhere("1/2"), **below("1/2", "relu")},
    g=lambda v: v["y"] - v["t"],
    d1=lambda v: v["ga1"],
)
net(
    "no mask, transposed",
    {"w1": ("relu", "transpose"), "b1": ("relu",)},
    d1=lambda v: v["ga1"],
    gw1=lambda v: v["x"].T @ v["d1"],
)
net(
    "slope out and mask out",
    {**everywhere("sigmoid"), **below("sigmoid", "relu")},
    SIGMOID_OUT,
    d2=lambda v: v["g"],
    d1=lambda v: v["ga1"],
)
net(
    "z for a, and divided",
    {"w2": ("x @ w1.T + b1", "1/12")},
    gw2=lambda v: v["d2"].T @ v["z1"] / ROWS,
)
# One output: elements that are alone.
net("one output, mask", below("relu", "left out"), ONE_OUT, d1=lambda v: v["ga1"])
net("one output, bias divided", {"b2": ("1/12|mean",)}, ONE_OUT, gb2=lambda v: v["d2"].mean(0))
net("zero", {"b1": ("it is 0",)}, gb1=lambda v: 0 * v["d1"].sum(0))
net("absolute value", {"w1": ("sign", "absolute")}, gw1=lambda v: (v["d1"].T @ v["x"]).abs())

# -- Cross entropies -------------------------------------------------------------


def classifier(slope, loss=lambda y, c: F.cross_entropy(y, c, reduction="sum"), **options):
    """A case of one layer and a cross entropy; slope(y, p, one_hot) is its wrong gradient."""

    def case():
        x, c = draw(ROWS, IN), torch.randint(4, (ROWS,))
        one_hot = F.one_hot(c, 4).double()

        def function(w, b):
            return loss(x @ w.T + b, c)

        def backward(w, b):
            y = x @ w.T + b
            d = slope(y, y.softmax(1), one_hot)
            return d.T @ x, d.sum(0)

        return function, [draw(4, IN), draw(4)], backward

    return case


def by_logsumexp(y, c):
    return (torch.logsumexp(y, 1) - (F.one_hot(c, 4) * y).sum(1)).sum()


def by_softmax(y, c):
    return -torch.log(torch.softmax(y, 1)[range(len(y)), c]).sum()


def by_hand(y, c):
    e = torch.exp(y - y.max(1, keepdim=True).values)
    return -(F.one_hot(c, 4) * torch.log(e / e.sum(1, keepdim=True))).sum()


def by_nll(y, c):
    return F.nll_loss(torch.log_softmax(y, 1), c)


LOSSES = {"": None, ", logsumexp": by_logsumexp, ", softmax": by_softmax, ", exp": by_hand}
for form, loss in LOSSES.items():
    options = {} if loss is None else {"loss": loss}
    both = lambda *words: {"w": words, "b": words}  # noqa: E731
    wrong(f"no one-hot target{form}", **both("one-hot|target"))(
        classifier(lambda y, p, t: p, **options)
    )
    wrong(f"diagonal Jacobian{form}", **both("softmax", "diagonal"))(
        classifier(lambda y, p, t: -t * (1 - p), **options)
    )
    wrong(f"softmax as a sigmoid{form}", **both("p * (1 - p)|p (1 - p)"))(
        classifier(lambda y, p, t: (p - t) * p * (1 - p), **options)
    )
wrong("mean forgotten, nll", w=("12 times", "rows"), b=("12 times", "rows"))(
    classifier(lambda y, p, t: p - t, loss=by_nll)
)
wrong("logits for probabilities", w=("softmax",), b=("softmax",))(classifier(lambda y, p, t: y - t))


def bce(slope, function):
    def case():
        x, t = draw(ROWS, IN), torch.randint(2, (ROWS, 2)).double()

        def backward(w, b):
            y = x @ w.T + b
            d = slope(y, torch.sigmoid(y), t)
            return d.T @ x, d.sum(0)

        return lambda w, b: function(x @ w.T + b, t), [draw(2, IN), draw(2)], backward

    return case


def explicit(y, t):
    p = torch.sigmoid(y)
    return -(t * p.log() + (1 - t) * (1 - p).log()).sum()


BCES = {
    "": lambda y, t: F.binary_cross_entropy_with_logits(y, t, reduction="sum"),
    ", softplus": lambda y, t: (F.softplus(y) - t * y).sum(),
    ", explicit": explicit,
    ", of p": lambda y, t: F.binary_cross_entropy(torch.sigmoid(y), t, reduction="sum"),
}
for form, loss in BCES.items():
    wrong(f"superfluous y (1 - y){form}", w=("sigmoid|p * (1 - p)",), b=("sigmoid|p * (1 - p)",))(
        bce(lambda y, p, t: (p - t) * p * (1 - p), loss)
    )
    wrong(f"BCE: no target{form}", w=("target",), b=("target",))(bce(lambda y, p, t: p, loss))
wrong("BCE: slope left out", w=("sigmoid", "left out"), b=("sigmoid", "left out"))(
    bce(lambda y, p, t: (p - t) / (p * (1 - p)), explicit)
)

# -- Other losses and functions --------------------------------------------------


def linear(loss, slope, **gradients):
    """y = x wᵀ + b, a loss of the error e = y - t, and its slope as derived."""

    def case():
        x, t = draw(ROWS, IN), draw(ROWS, 2)

        def backward(w, b):
            d = slope(x @ w.T + b - t)
            found = {"w": d.T @ x, "b": d.sum(0)}
            return {
                n: gradients[n](g, {"w": w, "b": b}[n]) if n in gradients else g
                for n, g in found.items()
            }

        return lambda w, b: loss(x @ w.T + b - t, w, b), {"w": draw(2, IN), "b": draw(2)}, backward

    return case


wrong("absolute error without its sign", w=("abs", "left out|sign"), b=("abs",))(
    linear(lambda e, w, b: e.abs().sum(), torch.ones_like)
)
wrong("error in place of its sign", w=("abs",), b=("abs",))(
    linear(lambda e, w, b: e.abs().sum(), lambda e: e)
)
wrong("sign in place of the error", w=("sign",), b=("sign",))(
    linear(lambda e, w, b: e.square().sum(), torch.sign)
)
wrong("Huber without its clamp", w=("huber|smooth_l1|clamp",), b=("huber|smooth_l1|clamp",))(
    linear(lambda e, w, b: F.huber_loss(e, torch.zeros_like(e), reduction="sum"), lambda e: e)
)
wrong("weight decay forgotten", w=("-0.2 times w", "decay|regular"))(
    linear(lambda e, w, b: e.square().sum() + 0.1 * w.square().sum(), lambda e: 2 * e)
)
wrong("weight decay too much", w=("0.2 times w", "decay|regular"))(
    linear(lambda e, w, b: e.square().sum(), lambda e: 2 * e, w=lambda g, w: g + 0.2 * w)
)
wrong("a small decay forgotten", w=("times w", "decay|regular"))(
    linear(lambda e, w, b: e.square().sum() + 1e-5 * w.square().sum(), lambda e: 2 * e)
)
wrong("L1 forgotten", w=("sign of w",))(
    linear(lambda e, w, b: e.square().sum() + 0.1 * w.abs().sum(), lambda e: 2 * e)
)
wrong("a constant too much", b=("constant",))(
    linear(lambda e, w, b: e.square().sum(), lambda e: 2 * e, b=lambda g, b: g + 1)
)
wrong("normalized", w=("norm",))(
    linear(lambda e, w, b: e.square().sum(), lambda e: 2 * e, w=lambda g, w: g / g.norm())
)
wrong("clipped", w=("clip|clamp",))(
    linear(lambda e, w, b: e.square().sum(), lambda e: 2 * e, w=lambda g, w: g.clamp(-4, 4))
)


def exchanged(a, c):
    def case():
        x = draw(16, 3)

        def backward(a, c):
            d = 2 * x @ a.T @ c.T
            return d.T @ (x @ a.T), (d @ c).T @ x

        return lambda a, c: (x @ a.T @ c.T).square().sum(), [draw(*a), draw(*c)], backward

    return case


wrong("exchanged", a=("gradient of c",), c=("gradient of a",))(exchanged((3, 3), (3, 3)))
wrong("exchanged, other shapes", a=("gradient of c",), c=("gradient of a",))(
    exchanged((5, 3), (2, 5))
)


@wrong("batch statistics as constants", x=("mean", "var|std", "constant"))
def batch_norm():
    t = draw(ROWS, 3)

    def norm(x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    def backward(x):
        g = 2 * (norm(x) - t)
        return g / (x.var(0, unbiased=False) + 1e-5).sqrt()

    return lambda x: (norm(x) - t).square().sum(), [draw(ROWS, 3)], backward


@wrong("the variance as a constant", x=("var", "constant"))
def variance():
    t = draw(ROWS, 3)

    def norm(x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    def backward(x):
        g = 2 * (norm(x) - t) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        return g - g.mean(0)

    return lambda x: (norm(x) - t).square().sum(), [draw(ROWS, 3)], backward


@wrong("batch_norm with constants", x=("statistics|mean", "constant"))
def native_batch_norm():
    t = draw(ROWS, 3)

    def norm(x):
        return F.batch_norm(x, None, None, training=True)

    def backward(x):
        return 2 * (norm(x) - t) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    return lambda x: (norm(x) - t).square().sum(), [draw(ROWS, 3)], backward


@wrong("layer_norm with constants", x=("statistics|mean", "constant"))
def native_layer_norm():
    t = draw(ROWS, 4)

    def backward(x):
        return (
            2 * (F.layer_norm(x, [4]) - t) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        )

    return lambda x: (F.layer_norm(x, [4]) - t).square().sum(), [draw(ROWS, 4)], backward


def recurrent(overwrite=False, truncate=False):
    def case():
        xs, t = draw(4, 6, 3), draw(6, 5)

        def states(w, u):
            hs = [torch.zeros(6, 5, dtype=torch.float64)]
            for x in xs:
                hs.append(torch.tanh(x @ w.T + hs[-1] @ u.T))
            return hs

        def backward(w, u):
            hs = states(w, u)
            g, gw, gu = 2 * (hs[-1] - t), 0, 0
            for n in reversed(range(4)):
                d = g * (1 - hs[n + 1] ** 2)
                gw = d.T @ xs[n] + (0 if overwrite else gw)
                gu = d.T @ hs[n] + gu
                g = d @ u
                if truncate:
                    break
            return gw, gu

        return (
            lambda w, u: (states(w, u)[-1] - t).square().sum(),
            [draw(5, 3), draw(5, 5)],
            backward,
        )

    return case


wrong("a loop that overwrites", w=("first", "+="))(recurrent(overwrite=True))
wrong("through one step of four", w=("last", "step|use"), u=("last", "step|use"))(
    recurrent(truncate=True)
)


@wrong("a skip connection forgotten", w=("skip|path|way",))
def skip():
    x, v, t = draw(ROWS, 3), draw(3, 3), draw(ROWS, 3)

    def loss(w):
        h = x @ w.T
        return (h + torch.tanh(h @ v) - t).square().sum()

    def backward(w):
        h = x @ w.T
        s = torch.tanh(h @ v)
        g = 2 * (h + s - t)
        return ((g * (1 - s**2)) @ v.T).T @ x

    return loss, [draw(3, 3)], backward


@wrong("an embedding that overwrites", table=("index|place", "+=|accumulate|add"))
def embedding():
    places, t = torch.tensor([0, 2, 2, 1, 0]), draw(5, 3)

    def backward(table):
        grad = torch.zeros_like(table)
        grad[places] = 2 * (table[places] - t)
        return grad

    return lambda table: (table[places] - t).square().sum(), [draw(4, 3)], backward


@wrong("attention without its scale", q=("2 times", "q @ k.T / 2"), k=("2 times", "q @ k.T / 2"))
def scale():
    v, t = draw(6, 4), draw(6, 4)

    def loss(q, k):
        return ((q @ k.T / 2).softmax(1) @ v - t).square().sum()

    def backward(q, k):
        p = (q @ k.T / 2).softmax(1)
        g = 2 * (p @ v - t) @ v.T
        d = p * (g - (p * g).sum(1, keepdim=True))
        return d @ k, d.T @ q

    return loss, [draw(6, 4), draw(6, 4)], backward


@wrong("attention's diagonal", q=("softmax", "diagonal"), k=("softmax", "diagonal"))
def diagonal():
    v, t = draw(6, 4), draw(6, 4)

    def loss(q, k):
        return ((q @ k.T / 2).softmax(1) @ v - t).square().sum()

    def backward(q, k):
        p = (q @ k.T / 2).softmax(1)
        d = 2 * (p @ v - t) @ v.T * p * (1 - p) / 2
        return d @ k, d.T @ q

    return loss, [draw(6, 4), draw(6, 4)], backward


@wrong("weights updated too early", w1=("w2", "update"), b1=("w2", "update"))
def updated():
    net = Net()
    lr = 1e-2

    def backward(w1, b1, w2, b2):
        grads = net.backward(w1, b1, w2, b2)
        early = Net.backward(net, w1, b1, w2, b2)
        z1 = net.x @ w1.T + b1
        d2 = 2 * (torch.relu(z1) @ w2.T + b2 - net.t)
        d1 = d2 @ (w2 - lr * grads["w2"]) * (z1 > 0)
        return {**early, "w1": d1.T @ net.x, "b1": d1.sum(0)}

    return net.loss, net.inputs, backward


@wrong("the wrong factor of a product", a=("a", "b"), b=("a", "b"))
def product():
    t = draw(5)
    return (
        lambda a, b: (a * b - t).square().sum(),
        [draw(5), draw(5)],
        lambda a, b: (2 * (a * b - t) * a, 2 * (a * b - t) * b),
    )


@wrong("a quotient without its square", b=("b", "/"))
def quotient():
    return (
        lambda a, b: (a / b).sum(),
        [draw(5), draw(5)],
        lambda a, b: (1 / b, -a / b),
    )


@wrong("a chain rule without its inner derivative", w=("sin|cos", "left out|inner"))
def inner():
    return lambda w: torch.exp(torch.sin(w)).sum(), [draw(6)], lambda w: torch.exp(torch.sin(w))


# -- Right ones ------------------------------------------------------------------


for hidden in SLOPES:
    for output in SLOPES:
        right(f"{hidden}, {output}")(lambda h=hidden, o=output: Net(h, o).case())
right("square")(lambda: Net(**SQUARE).case())
right("one output")(lambda: Net(**ONE_OUT).case())
for form, loss in LOSSES.items():
    options = {} if loss is None else {"loss": loss}
    right(f"cross entropy{form}")(classifier(lambda y, p, t: p - t, **options))
for form, loss in BCES.items():
    right(f"binary cross entropy{form}")(bce(lambda y, p, t: p - t, loss))
right("absolute error")(linear(lambda e, w, b: e.abs().sum(), torch.sign))
right("weight decay")(
    linear(
        lambda e, w, b: e.square().sum() + 0.1 * w.square().sum(),
        lambda e: 2 * e,
        w=lambda g, w: g + 0.2 * w,
    )
)
right("recurrent")(recurrent())


# -- The tests -------------------------------------------------------------------


def said_of(report):
    return {p.name: " ".join(p.findings()) for p in report.parameters if list(p.findings())}


def misses(said, words):
    """The words that are missing, among all findings."""
    return [
        (name, word)
        for name, expected in words.items()
        for word in expected
        if not any(part in said.get(name, "") for part in word.split("|"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named(name):
    case, words = WRONG[name]
    torch.manual_seed(0)
    report = check_gradients(*case())
    said = said_of(report)
    assert not report.ok
    assert set(said) == set(words), said
    assert not misses(said, words), said


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_derivation_is_not_accused(name):
    for seed in range(3):
        torch.manual_seed(seed)
        report = check_gradients(*RIGHT[name]())
        assert report.ok and not said_of(report), str(report)


# -- Mistakes in several layers, and where they are ------------------------------

SIZES = (6, 6, 6, 6, 6)


class Deep:
    """Four layers of equal width, in loops, as they are written for any number of layers."""

    def __init__(self, step=None, layer_input=None):
        self.x, self.t = draw(10, 6), draw(10, 6)
        self.step = step or (lambda delta, w, z, a, n: (delta @ w) * (z[n - 1] > 0))
        self.layer_input = layer_input or (lambda z, a, n: a[n])
        self.inputs = {}
        for n in range(4):
            self.inputs |= {f"w{n}": 0.5 * draw(6, 6), f"b{n}": draw(6)}

    def forward(self, **p):
        z, a = [], [self.x]
        for n in range(4):
            z.append(a[n] @ p[f"w{n}"].T + p[f"b{n}"])
            a.append(torch.relu(z[n]) if n < 3 else z[n])
        return z, a

    def loss(self, **p):
        return ((self.forward(**p)[1][-1] - self.t) ** 2).mean()

    def backward(self, **p):
        z, a = self.forward(**p)
        delta, grads = 2 * (a[-1] - self.t) / 60, {}
        for n in reversed(range(4)):
            grads[f"w{n}"] = delta.T @ self.layer_input(z, a, n)
            grads[f"b{n}"] = delta.sum(0)
            if n:
                delta = self.step(delta, p[f"w{n}"], z, a, n)
        return grads

    def said(self):
        return said_of(check_gradients(self.loss, self.inputs, self.backward))


IN_EVERY_LAYER = {
    "no mask": (lambda d, w, z, a, n: d @ w, "the derivative of relu"),
    "mask of the layer above": (lambda d, w, z, a, n: (d @ w) * (z[n] > 0), "the mask of relu"),
    "times a": (lambda d, w, z, a, n: (d @ w) * a[n], "multiplied by y"),
    "w transposed": (lambda d, w, z, a, n: (d @ w.T) * (z[n - 1] > 0), "is transposed"),
}


@pytest.mark.parametrize(("step", "words"), IN_EVERY_LAYER.values(), ids=list(IN_EVERY_LAYER))
def test_a_mistake_in_every_layer(step, words):
    """It is named in each, and everything above the first of them is said to be right."""
    torch.manual_seed(0)
    said = Deep(step=step).said()
    assert list(said) == ["w0", "b0", "w1", "b1", "w2", "b2"]
    for name, sentence in said.items():
        assert words in sentence
        assert "Everything above layer 3 is right (w3 and b3)" in sentence
        assert ("the same mistake is made above it" in sentence) == ("2" not in name)


def test_a_mistake_in_one_layer():
    torch.manual_seed(0)
    net = Deep(step=lambda d, w, z, a, n: (d @ w) * (z[n - 1] > 0) if n != 2 else d @ w)
    said = net.said()
    assert list(said) == ["w0", "b0", "w1", "b1"]
    for sentence in said.values():
        assert "the derivative of relu" in sentence and "left out" in sentence
        assert "Everything above layer 2 is right (w2, b2, w3 and b3)" in sentence


def test_pre_activations_in_every_layer():
    torch.manual_seed(0)
    said = Deep(layer_input=lambda z, a, n: a[n] if n == 0 else z[n - 1]).said()
    assert list(said) == ["w1", "w2", "w3"]
    for sentence in said.values():
        assert "the pre-activation of relu" in sentence and "same mistake" not in sentence


# -- What is not known is not named ----------------------------------------------


UNKNOWN = {
    "a random mask": lambda v: v["ga1"] * (draw(ROWS, HIDDEN) > 0),
    "a threshold": lambda v: v["ga1"] * (v["z1"] > 0.3),
    "noise": lambda v: v["ga1"] * (v["z1"] > 0) + 0.1 * draw(ROWS, HIDDEN),
}


@pytest.mark.parametrize("mistake", UNKNOWN.values(), ids=list(UNKNOWN))
def test_a_mistake_that_nobody_knows(mistake):
    """It is said how much is wrong, and where to look."""
    torch.manual_seed(0)
    said = said_of(check_gradients(*Net(d1=mistake).case()))
    for name, sentence in said.items():
        assert f"of {15 if name == 'w1' else 5} elements are wrong" in sentence
        assert "Everything above layer 1 is right (w2 and b2), so look at" in sentence


def test_the_last_step_of_one_gradient():
    torch.manual_seed(0)
    said = said_of(check_gradients(*Net(gw1=lambda v: v["d1"].T @ v["x"] + draw(5, 3)).case()))
    assert "b1 beside it is right" in said["w1"] and "look at the last step" in said["w1"]


def test_a_single_element_is_told_no_factor():
    torch.manual_seed(0)
    said = said_of(
        check_gradients(*Net(sizes=(IN, HIDDEN, 1), gb2=lambda v: v["d2"].sum(0) * 0.7123).case())
    )
    assert "instead of" in said["b2"] and "times" not in said["b2"]


def test_a_rounded_gradient_is_not_a_small_term():
    torch.manual_seed(0)
    case = linear(lambda e, w, b: e.square().sum(), lambda e: 2 * e, w=lambda g, w: g.float())
    assert "single precision" in said_of(check_gradients(*case()))["w"]
    case = linear(lambda e, w, b: e.square().sum() + 1e-6 * (w**3).sum(), lambda e: 2 * e)
    said = said_of(check_gradients(*case()))
    assert "single precision" not in said["w"] and "w**3, is left out" in said["w"]
    noise = 1e-7 * draw(2, 3)
    case = linear(lambda e, w, b: e.square().sum(), lambda e: 2 * e, w=lambda g, w: g + noise)
    said = said_of(check_gradients(*case()))
    assert "right to some digits only (the largest error is" in said["w"]
    assert "single precision" not in said["w"]


# -- Functions of every kind -----------------------------------------------------


def in_place(x, w):
    h = x @ w.T
    h += 1
    return torch.tanh(h.mul_(2)).square().sum()


def into_views(x, w):
    h = torch.zeros(ROWS, 5, dtype=torch.float64)
    for n in range(ROWS):
        h[n] = x[n] @ w.T
    return torch.tanh(2 * (h + 1)).square().sum()


@pytest.mark.parametrize("function", [in_place, into_views])
def test_functions_that_write(function):
    torch.manual_seed(0)
    x = draw(ROWS, 3)

    def backward(w, right=True):
        a = torch.tanh(2 * (x @ w.T + 1))
        d = 2 * a * (1 - a**2) if right else 2 * a
        return 2 * d.T @ x

    assert check_gradients(lambda w: function(x, w), [draw(5, 3)], backward).ok
    report = check_gradients(
        lambda w: function(x, w), [draw(5, 3)], lambda w: backward(w, right=False)
    )
    assert "the derivative of tanh is left out" in said_of(report)["w"]


def test_constants_of_a_function():
    """What autograd takes for a constant is one for the search, too."""
    torch.manual_seed(0)
    x = draw(ROWS, 3)

    def loss(w):
        with torch.no_grad():
            scale = w.norm()
        return (torch.sigmoid(x @ w.T) * scale + w.detach().sum()).square().sum()

    w = draw(5, 3)
    leaf = w.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf), leaf)
    report = check_gradients(loss, [w], lambda w: right)
    # the differences see that the function is not what autograd takes it for
    assert not report.parameters[0].is_wrong.any() and report.parameters[0].is_disputed.any()
    said = said_of(check_gradients(loss, [w], lambda w: 3 * right))["w"]
    assert "wrong by hand: it is 3 times autograd's" in said


def test_a_function_that_can_not_be_recorded():
    """Without a tape, what is seen from the gradients alone is told."""
    torch.manual_seed(0)

    def loss(w):
        for _ in range(1100):
            w = w * 1.0
        return w.square().sum()

    said = said_of(check_gradients(loss, [draw(2)], lambda w: 3 * w))["w"]
    assert "3/2" in said or "1.5 times" in said
