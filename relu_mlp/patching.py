"""The former module of `FusedSequential`. Pickles of whole models look for it here."""

from .fusion.sequential import FusedSequential as FusedSequential
