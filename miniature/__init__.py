"""A small world with a latent diffusion model and classifiers of its own.

In Stable Diffusion's file layout.
"""
