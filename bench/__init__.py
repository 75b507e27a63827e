"""Measuring, from outside and over HTTP: one load generator for ours and for every peer. See README.md here."""
