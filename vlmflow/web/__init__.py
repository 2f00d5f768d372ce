"""``vlmflow serve``: a small web app to search a catalog, look at its images and their evidence, and decide on them.

Its parts: ``guard`` lets nobody in without the token; ``shelf`` holds the newest version of the catalog ready, with the
``facts`` that filters and counts need; ``judging`` takes people's verdicts; ``pictures`` makes small pictures;
``pages`` and ``actions`` answer requests. Needs ``pip install 'vlmflow[serve]'``.
"""
