"""A small world with its own latent diffusion model and classifiers, in Stable Diffusion's file
layout.
"""
