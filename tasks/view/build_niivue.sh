#!/usr/bin/env bash
# Makes static/niivue.js, the viewer that the page of `medvl view` shows images with, and static/niivue.LICENSES.txt, from the npm registry.
# Needs node and npm, and is run by hand when VERSION moves; both files are committed, so neither users nor tests need node.
#
# It is a classic script with one global, `niivue`: a page opened from disk may not load modules. Its reader of remote zarr images is left
# out, for the page asks nothing of any network: that halves the file. Nor does it work out gradients, which serve lighting in 3D alone:
# the page has none, and they take more time and memory of the graphics card than all else when a large CT is opened.
set -euo pipefail

VERSION=0.69.0
ESBUILD=0.28.2
static=$(cd "$(dirname "$0")" && pwd)/static
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

npm init -y >/dev/null
npm install --silent --ignore-scripts "@niivue/niivue@$VERSION" "esbuild@$ESBUILD"
echo "export {}" >no_zarr.js
source=node_modules/@niivue/niivue/build/niivue/index.js
[ "$(grep -c '^function gradientGL(params) {$' "$source")" = 1 ]
sed -i 's/^function gradientGL(params) {$/&\n  return params.gradientTexture;/' "$source"
npx esbuild "$source" --bundle --minify --charset=utf8 --target=es2022 --legal-comments=none \
    --format=iife --global-name=niivue --alias:zarrita="$work/no_zarr.js" --outfile=niivue.js

{
    echo "niivue.js is @niivue/niivue $VERSION with what it depends on, bundled and minified by build_niivue.sh, without its zarr reader"
    echo "and its gradients. The font in it is an atlas of Roboto, under the Apache License 2.0, the one that medvl is under."
    echo
    echo "== @niivue/niivue $VERSION (BSD-2-Clause)"
    cat "$static/../niivue.LICENSE"
    for package in @lukeed/uuid @ungap/structured-clone array-equal fflate gl-matrix nifti-reader-js; do
        echo
        node -p "const p = require('./node_modules/$package/package.json'); '== ' + p.name + ' ' + p.version + ' (' + p.license + ')'"
        cat "node_modules/$package"/[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*
    done
} >niivue.LICENSES.txt
mv niivue.js niivue.LICENSES.txt "$static/"
