"""Faults planted into an attention: those of the script that plants them into a real model."""

from __future__ import annotations

from scripts import script

planted_faults = script("planted_faults")
Fault, plant = planted_faults.Fault, planted_faults.plant
