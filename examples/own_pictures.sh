#!/bin/sh
# From a folder of captioned pictures to engines to new pictures:
#
#     python examples/draw_pictures.py pictures && sh examples/own_pictures.sh pictures own
#
# The folder has NAME.png (or .jpg, ...) with a caption in NAME.txt beside it. What follows the two
# folders goes to nsp train: --steps 1000, or --preset emoji for a model from new weights.
set -eu
folder=$1 made=$2
shift 2

# 1. The bundled model learns the pictures. It says first how well its image tokenizer rebuilds them
#    (made/run/reconstructions.png), and in the end how often a drawn picture is the right one.
nsp train --data "$folder" --output-dir "$made/run" "$@"

# 2. Engines, each compared with PyTorch before it is kept.
nsp export --checkpoint "$made/run/checkpoint" --engine-dir "$made/engines"

# 3. Pictures for the first captions of the folder; any other sentence of these words will do, too.
awk 1 "$folder"/*.txt | head -n 24 > "$made/prompts.txt"
nsp generate --engine-dir "$made/engines" --prompts-file "$made/prompts.txt" \
    --output-dir "$made/pictures"
