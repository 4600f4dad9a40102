#!/bin/sh
# curl against `qvl serve`: one question about an image, and a stream. Start `qvl serve` first, or set QVL_URL.
set -eu
url="${QVL_URL:-http://127.0.0.1:8000/v1}"
image="$(dirname "$0")/../../qvl_runtime/assets/demo.jpg"

ask() { # text, further fields: the JSON of a request, from standard input, since an image is too long for an argument
  printf '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,'
  base64 < "$image" | tr -d '\n'
  printf '"}}, {"type": "text", "text": "%s"}]}]%s}' "$1" "$2"
}

post() {
  curl --silent --show-error --no-buffer "$url/chat/completions" --header 'Content-Type: application/json' \
    --header "Authorization: Bearer ${QVL_KEY:-none}" --data-binary @-
}

ask 'Box the cat.' '' | post
echo
ask 'What is the number?' ', "stream": true' | post
