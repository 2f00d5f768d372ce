#!/bin/sh
# Makes the secrets of compose.yaml, once, as files in deploy/secrets/ (not in git); those that are there stay.
# The folder keeps other users of this machine out; the files must be readable for the users inside the containers.
set -eu
CDPATH= cd -- "$(dirname -- "$0")"
mkdir -p secrets
chmod 700 secrets

# keep NAME: writes standard input to the secret, unless it exists. An empty one, as a full disk leaves, is none.
keep() {
    if [ ! -s "secrets/$1" ]; then
        rm -f secrets/.new
        cat > secrets/.new
        # What `random` was to give is missing, and nobody would be asked for this one.
        if [ "$(wc -c < secrets/.new)" -lt 20 ]; then
            echo "secrets.sh: deploy/secrets/$1 would be too short: this machine must have od and /dev/urandom" >&2
            exit 1
        fi
        chmod 444 secrets/.new
        mv -f secrets/.new "secrets/$1"
    fi
}

# random BYTES: that many random bytes, in hexadecimal, without a newline.
random() {
    od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'
}

random 32 | keep ray_token
random 24 | keep postgres_password
random 24 | keep grafana_password
printf 'vlmflow:%s' "$(random 24)" | keep prefect_auth
random 10 | keep aws_access_key_id
random 24 | keep aws_secret_access_key
printf '{"identities": [{"name": "vlmflow", "actions": ["Admin", "Read", "Write", "List", "Tagging"], "credentials": [{"accessKey": "%s", "secretKey": "%s"}]}]}\n' \
    "$(cat secrets/aws_access_key_id)" "$(cat secrets/aws_secret_access_key)" | keep store_identities.json
echo "deploy/secrets/ holds: $(ls secrets | tr '\n' ' ')"
