"""Optimizers: one file an algorithm, each its paper's update rule on one common base."""

from lmlosses.optim.adafactor import Adafactor
from lmlosses.optim.adagrad import Adagrad
from lmlosses.optim.adam import Adam, AdamW
from lmlosses.optim.adopt import ADOPT
from lmlosses.optim.cautious import cautious
from lmlosses.optim.groups import decay_groups, layerwise_groups, matrix_groups
from lmlosses.optim.lion import Lion
from lmlosses.optim.manifolds import Euclidean, Manifold, Simplex, Sphere
from lmlosses.optim.memory import StateBytes, state_bytes
from lmlosses.optim.muon import Muon, newton_schulz
from lmlosses.optim.natural import NaturalGradient
from lmlosses.optim.riemannian import RiemannianAdam, RiemannianSGD
from lmlosses.optim.rmsprop import RMSprop
from lmlosses.optim.schedule_free import ScheduleFreeAdamW
from lmlosses.optim.sgd import SGD, SignSGD
from lmlosses.optim.soap import SOAP
from lmlosses.optim.sophia import SophiaG, SophiaH

__all__ = [
    "ADOPT",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Euclidean",
    "Lion",
    "Manifold",
    "Muon",
    "NaturalGradient",
    "RMSprop",
    "RiemannianAdam",
    "RiemannianSGD",
    "SGD",
    "SOAP",
    "ScheduleFreeAdamW",
    "SignSGD",
    "Simplex",
    "SophiaG",
    "SophiaH",
    "Sphere",
    "StateBytes",
    "cautious",
    "decay_groups",
    "layerwise_groups",
    "matrix_groups",
    "newton_schulz",
    "state_bytes",
]
