#!/bin/sh
set -eu
mkdir -p "$1/deep/er" "$1/empty"
echo content > "$1/deep/er/file.txt"
printf '#!/bin/sh\necho ran\n' > "$1/run.sh"
chmod +x "$1/run.sh"
