"""Facts made elsewhere behind the interface of the lexicon: files of a language model, RadGraph or CheXbert, a callable, an endpoint.

Nothing here is loaded until asked for, and no text leaves the machine unless ``reports.providers.endpoint`` is told that it may.
"""
