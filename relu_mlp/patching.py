"""The former home of `FusedSequential`: pickles of whole models look for it here."""

from .fusion.sequential import FusedSequential as FusedSequential
