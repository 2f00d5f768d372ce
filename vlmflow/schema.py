"""The Arrow schemas of vlmflow: what flows between its parts, and the tables that readers rely on.

``IMAGES`` and ``EMBEDDINGS`` are the contract with every reader of a catalog. The others never leave a run.
"""

from __future__ import annotations

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")

ERROR = pa.struct([("stage", pa.string()), ("class", pa.string()), ("message", pa.string())])
ERRORS = pa.list_(ERROR)

LABEL = pa.struct(
    [
        ("label", pa.string()),
        ("category", pa.string()),
        ("margin", pa.float32()),  # similarity to the label's prompts minus log-mean-exp over the neutral ones
        ("score", pa.float32()),  # logistic of the margin, in [0, 1]; null: not scored
        ("probability", pa.float32()),  # null until the label is calibrated
        ("review_threshold", pa.float32()),  # thresholds are compared with the probability; where null, the score
        ("block_threshold", pa.float32()),
        ("decision", pa.string()),  # allow, review or block
        ("view", pa.string()),  # the view that decided
        ("time_s", pa.float32()),  # of a frame; null for a still
        ("detector", pa.string()),  # that scored it; null: the label's prompts did
    ]
)

# What a detector gave for one of its outputs, of the view where it was highest; kept whatever the policy makes of it.
DETECTION = pa.struct(
    [
        ("detector", pa.string()),  # its name in the policy
        ("model", pa.string()),  # digest of its weights and preprocessing
        ("output", pa.string()),
        ("score", pa.float32()),  # in [0, 1]
        ("view", pa.string()),
        ("time_s", pa.float32()),
    ]
)

# The answer to one question; null: the model gave none.
ANSWER = pa.struct([("question", pa.string()), ("answer", pa.string()), ("score", pa.float32())])

# The regions of an image that the caller has computed; see vlmflow.sources.regions.
REGIONS = pa.struct(
    [
        ("features", pa.list_(pa.list_(pa.float32()))),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("width", pa.float32()),
        ("height", pa.float32()),
    ]
)

# What a source lists: no image is opened for it. `locator`, `offset` and `length` say where to read and are never
# stored in the catalog (a locator may carry the signature of a presigned url).
REFERENCE = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        ("key", pa.string()),
        ("object_version", pa.string()),  # null: the source cannot tell without reading
        ("size_bytes", pa.int64()),
        pa.field("locator", pa.string(), nullable=False),
        ("offset", pa.int64()),  # a byte range of the locator (a tar member); null: the whole object
        ("length", pa.int64()),
        ("row", pa.int64()),  # a row of a Parquet file of image bytes; null elsewhere
        ("text", pa.string()),  # the caller's text that `match` scores; null: none
        ("regions_row", pa.int64()),  # the row of the manifest, where it has a column of regions; null elsewhere
        ("questions", pa.list_(pa.string())),  # the caller's questions to this image, for `answer`; null: none
    ]
)  # followed by `source`: struct of the caller's columns, where the source has any

# What reading and decoding add.
FACTS = pa.schema(
    [
        ("content_hash", pa.string()),  # sha256 of the bytes, hexadecimal
        ("format", pa.string()),  # jpeg, png, webp, gif, bmp, tiff, avif, heic, mp4, webm
        ("mode", pa.string()),  # Pillow's mode of the file, before normalisation
        ("width", pa.int32()),  # as displayed: after the EXIF orientation
        ("height", pa.int32()),
        ("num_frames", pa.int32()),
        # Perceptual hash of 64 bits, hexadecimal: near for images that look alike. Null: nothing is to be seen.
        ("phash", pa.string()),
    ]
)

# Bits that are set in the perceptual hash of an image of which something is to be seen. Those of plain ones have one
# set (of black ones none), whatever their colour, so they tell nothing; rows of older versions hold them.
LEAST_PHASH_BITS = 2

# What a row says of the bytes that it was made of.
READ = pa.struct([("object_version", pa.string()), ("http_validator", pa.string()), *FACTS])

# What planning adds to a reference before it enters the pipeline.
PLANNED = pa.schema(
    [
        ("due", pa.list_(pa.string())),  # tasks to run, should the bytes be new
        ("due_if_same", pa.list_(pa.string())),  # tasks to run, should the bytes equal those the row was made of
        ("previous_hash", pa.string()),  # content_hash of the live row; null: there is none
        ("previous_caption", pa.string()),  # for `match`, where `caption` itself is not due
        ("replaces", pa.bool_()),  # a live row exists
        ("attempts", pa.int32()),  # attempts before this one at this object version and these fingerprints
        ("failed_before", pa.bool_()),  # the live row is not `ok`, and the object has not changed since
        ("ingest_date", pa.date32()),  # kept from the live row, else the run's logical date
        ("live_file", pa.string()),  # file of the images table that held the live row at planning
        ("previous_version", pa.string()),  # seen_version of the live row at planning
        ("previous_read", READ),  # of the live row, where nothing is due if the server still has its bytes; else null
    ]
)

# What the pipeline says of each image when it hands the rows to the catalog's writer.
OUTCOME = pa.schema(
    [
        ("errors", ERRORS),  # null or empty: none
        ("tasks_run", pa.list_(pa.string())),  # tasks that succeeded on this image
        ("tasks_failed", pa.list_(pa.string())),  # tasks that were tried on it and failed
    ]
)

# A person's word on an image, or that of a list of known images. It holds for the bytes that it was given on, and is
# the row's decision while it does; what the model says stands in it.
VERDICT = pa.struct(
    [
        ("decision", pa.string()),  # allow, review or block
        ("content_hash", pa.string()),  # of the bytes that were judged
        ("reviewer", pa.string()),
        ("at", TIMESTAMP),
        ("reason", pa.string()),
        ("model_decision", pa.string()),
        ("model_reason", pa.string()),
    ]
)

# What each task writes of an image: its `writes`. Results that are copied from an image of equal bytes are these.
TASK_OUTPUTS: dict[str, pa.Schema] = {
    "embed": pa.schema(
        [
            ("vectors", pa.list_(pa.list_(pa.float32()))),  # one unit vector per view; go to the embeddings table
            ("vector_views", pa.list_(pa.string())),
        ]
    ),
    "detect": pa.schema([("detections", pa.list_(DETECTION))]),
    "moderate": pa.schema([("labels", pa.list_(LABEL)), ("decision", pa.string()), ("decision_reason", pa.string())]),
    "caption": pa.schema([("caption", pa.string())]),
    "match": pa.schema(
        [
            # Null of a head that the model lacks.
            ("caption_itm", pa.float32()),  # probability that image and generated caption match, matching head
            ("caption_itc", pa.float32()),  # cosine of image and generated caption, contrastive heads
            ("text_itm", pa.float32()),  # the same for the caller's text
            ("text_itc", pa.float32()),
        ]
    ),
    "answer": pa.schema([("answers", pa.list_(ANSWER))]),  # in the order of the questions: the job's, then its own
}

# What the images table holds of each task: of its outputs those that stay in the row, and what the writer adds.
TASK_COLUMNS: dict[str, pa.Schema] = {
    "embed": pa.schema([("embed_run_id", pa.string()), ("embed_model", pa.string())]),
    "detect": TASK_OUTPUTS["detect"],
    "moderate": pa.schema(
        [
            TASK_OUTPUTS["moderate"].field("labels"),
            ("policy_name", pa.string()),
            ("policy_version", pa.string()),
            ("policy_digest", pa.string()),
            ("previous_policy", pa.string()),
        ]
    ),
    "caption": pa.schema(
        [
            *TASK_OUTPUTS["caption"],
            ("alt_text", pa.string()),  # of the caption and the text that the caller found in the image
            ("alt_text_rule", pa.string()),  # the rule of alternative texts that it breaks; null: none
            ("caption_model", pa.string()),
        ]
    ),
    "match": pa.schema(
        [
            *TASK_OUTPUTS["match"],
            ("text_digest", pa.string()),  # of the caller's text that was scored
            ("match_model", pa.string()),
        ]
    ),
    "answer": pa.schema(
        [
            *TASK_OUTPUTS["answer"],
            ("questions_digest", pa.string()),  # of the questions that were asked
            ("answer_model", pa.string()),
        ]
    ),
}
TASKS = tuple(TASK_COLUMNS)


def fingerprint_column(task: str) -> str:
    """Names the column of ``IMAGES`` that holds a task's fingerprint."""
    return f"{task}_fingerprint"


# One row per image: the ledger. `decision` is never null.
IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        ("key", pa.string()),
        ("object_version", pa.string()),  # as read; the values of the row belong to it
        ("seen_version", pa.string()),  # the newest version met, which may have been unreadable
        ("http_validator", pa.string()),  # strong ETag or Last-Modified of the bytes, as it was sent; null: none
        ("size_bytes", pa.int64()),
        *FACTS,
        pa.field("status", pa.string(), nullable=False),  # ok, partial, unreadable, missing, failed
        ("errors", ERRORS),
        ("attempts", pa.int32()),  # at this seen_version and attempt_digest
        ("attempt_digest", pa.string()),  # of what the last attempt ran with; see catalog/rows.py
        pa.field("decision", pa.string(), nullable=False),  # allow, review, block
        ("decision_reason", pa.string()),  # `verdict`: the decision is that of the next column
        ("verdict", VERDICT),
        *[field for columns in TASK_COLUMNS.values() for field in columns],
        *[pa.field(fingerprint_column(task), pa.string()) for task in TASKS],
        ("decoder", pa.string()),  # version of the decoder: unreadable images are due again when it changes
        pa.field("run_id", pa.string(), nullable=False),
        ("read_at", TIMESTAMP),  # when a run last read the image, tried to, or asked whether it has changed; null: old
        ("updated_at", TIMESTAMP),  # when it was last written, be it the caller's columns or a verdict alone
        pa.field("ingest_date", pa.date32(), nullable=False),  # partition: the date that first saw the image
    ]
)  # followed by `source`: struct of the caller's columns, where there are any

# Outputs of the tasks, each of which the writer takes if it is there.
WRITER_OPTIONAL = pa.schema(
    [
        *[field for outputs in TASK_OUTPUTS.values() for field in outputs],
        ("verdict", VERDICT),  # of a list of known images
    ]
)

# One row per image, object version, model and view. A reader joins on image_id and embed_run_id, which names the
# run whose vectors the image row refers to.
EMBEDDINGS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("object_version", pa.string()),
        pa.field("view", pa.string(), nullable=False),  # squash, center, ...
        ("time_s", pa.float32()),
        pa.field("vector", pa.list_(pa.float32()), nullable=False),  # of unit length
        pa.field("embed_fingerprint", pa.string(), nullable=False),
        pa.field("embed_run_id", pa.string(), nullable=False),
        pa.field("ingest_date", pa.date32(), nullable=False),  # partition: that of the image row
    ]
)

KEY = pa.binary(16)  # an image_id in 16 bytes: how keys travel
COUNTS = pa.list_(pa.struct([("name", pa.string()), ("count", pa.int64())]))

# One row per file that a worker wrote: what the driver needs to commit it.
DESCRIPTOR = pa.schema(
    [
        ("table", pa.string()),  # images or embeddings
        ("kind", pa.string()),  # add: a file of the table; replace: staged rows to merge into live ones
        ("path", pa.string()),  # relative to the catalog
        ("num_rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("ingest_date", pa.date32()),  # null for staged rows
        ("stats", pa.string()),  # JSON for the Delta log; null for staged rows
        ("plan_version", pa.int64()),  # of the file's table, when the run was planned
        ("keys", pa.list_(KEY)),  # of every row, in the file's order
        ("addresses", pa.list_(KEY)),  # of every row; null: without a key of the caller's; empty: no row has one
        ("statuses", COUNTS),  # rows by status; images only
        ("errors", COUNTS),  # rows' errors by class; images only
    ]
)


def with_source(schema: pa.Schema, source: pa.Schema | None) -> pa.Schema:
    """Appends the struct column ``source`` that carries the caller's columns; the same schema if there are none."""
    if source is None or len(source) == 0:
        return schema
    return schema.append(pa.field("source", pa.struct(list(source))))
