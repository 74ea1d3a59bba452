"""``medvl view``: a page on this machine that shows an image and where in it a phrase is, as one types.

``content`` turns a study into what the page shows, ``server`` hands it out on this machine, ``export`` writes it as a page that needs no
server; ``static`` is the page itself, the same for both.
"""
