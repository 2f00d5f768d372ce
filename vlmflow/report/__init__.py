"""What a run did and what a catalog holds, as one page of HTML that works from a file.

``rows`` and ``labels`` choose and count, ``collect`` goes over the table, ``runs`` reads the record of the run,
``pictures`` makes thumbnails, ``charts`` and ``sections`` write HTML, ``page`` puts it together.
"""
