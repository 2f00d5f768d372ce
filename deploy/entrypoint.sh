#!/bin/sh
# Secrets come as files: what the file of NAME_FILE holds becomes NAME, for libraries that read the environment alone.
# Then the command runs in the place of this shell.
set -eu
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING \
    PREFECT_SERVER_DATABASE_PASSWORD; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        value=$(cat "$file")
        # An empty secret keeps nobody out.
        if [ -z "$value" ]; then
            echo "vlmflow-entrypoint: $file, named by ${name}_FILE, is empty: write the secret into it" >&2
            exit 1
        fi
        export "$name=$value"
        unset "${name}_FILE"
    fi
done
exec "$@"
