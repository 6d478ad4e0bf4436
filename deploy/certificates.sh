#!/usr/bin/env bash
# certificates.sh FOLDER: make an authority and a certificate for scheduler, workers and clients, as distributed.yaml
# expects them. Whoever can read key.pem can use the cluster. The authority's own key is not kept.
set -euo pipefail
umask 077
folder=${1:?certificates.sh FOLDER}
mkdir -p "$folder"
authority=$(mktemp)
trap 'rm -f "$authority"' EXIT
openssl req -x509 -newkey rsa:3072 -noenc -days 3650 -subj /CN=scialm-authority -keyout "$authority" -out "$folder/ca.pem"
openssl req -new -newkey rsa:3072 -noenc -subj /CN=scialm -keyout "$folder/key.pem" |
    openssl x509 -req -days 3650 -CA "$folder/ca.pem" -CAkey "$authority" -CAcreateserial -CAserial "$authority.serial" \
        -out "$folder/cert.pem"
rm -f "$authority.serial"
