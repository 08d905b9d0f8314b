// The scale loop of `var` engines in a browser: what examples/plain_onnxruntime.py does, with the
// picture shown after every scale. docs/graphs.md describes the stages.
import * as ort from "onnxruntime-web";
import { Tokenizer } from "@huggingface/tokenizers";

const folder = new URLSearchParams(location.search).get("engines") ?? "/engines";
const json = async (path) => (await fetch(`${folder}/${path}`)).json();
const f32 = (data, dims) => new ort.Tensor("float32", Float32Array.from(data), dims);
const i64 = (data, dims) => new ort.Tensor("int64", BigInt64Array.from(data, BigInt), dims);
const filled = (n, value) => Array(n).fill(value);

const state = document.getElementById("state");
const manifest = await json("manifest.json");
const { patch_nums: sides, predictor, vae, condition } = manifest.config;
const files = Object.keys(manifest.files);
const tokenizer = new Tokenizer(
  await json(files.find((f) => f.endsWith("tokenizer.json"))),
  await json(files.find((f) => f.endsWith("tokenizer_config.json"))),
);
const sessions = {};
for (const [stage, built] of Object.entries(manifest.stages)) {
  const engine = built.find((each) => each.precision == "fp32");
  const [graph, ...data] = Object.keys(engine.files);
  const externalData = data.map((f) => ({ path: f.split("/").pop(), data: `${folder}/${f}` }));
  sessions[stage] = await ort.InferenceSession.create(`${folder}/${graph}`, { externalData });
}

// The matrices that enlarge a cells to b (bicubic) and that average a cells to b (area), row by row.
function bicubic(a, b) {
  const matrix = filled(a * b, 0);
  for (let i = 0; i < b; i++) {
    const centre = ((i + 0.5) * a) / b - 0.5;
    for (let tap = Math.floor(centre) - 1; tap < Math.floor(centre) + 3; tap++) {
      const d = Math.abs(centre - tap);
      const far = d < 2 ? ((d - 5) * d + 8) * -0.75 * d + 3 : 0;
      const column = Math.min(Math.max(tap, 0), a - 1);
      matrix[i * a + column] += d <= 1 ? (1.25 * d - 2.25) * d * d + 1 : far;
    }
  }
  return f32(matrix, [b, a]);
}
function area(a, b) {
  const matrix = filled(a * b, 0);
  for (let i = 0; i < b; i++) {
    const start = Math.floor((i * a) / b), stop = Math.ceil(((i + 1) * a) / b);
    for (let cell = start; cell < stop; cell++) matrix[i * a + cell] = 1 / (stop - start);
  }
  return f32(matrix, [b, a]);
}

// Which of the shared convolutions phi a scale uses.
function nearest(ratio) {
  const count = vae.share_quant_resi, edge = 1 / (count == 4 ? 3 : 2) / count;
  const step = count > 1 ? (1 - 2 * edge) / (count - 1) : 0;
  const distances = filled(count, 0).map((_, i) => Math.abs(edge + i * step - ratio));
  return distances.indexOf(Math.min(...distances));
}

async function* scales(prompt) {
  const pad = tokenizer.token_to_id("<|endoftext|>"), length = condition.max_tokens;
  const ids = [...tokenizer.encode(prompt).ids, ...filled(length, pad)].slice(0, length);
  const text = await sessions.text_encoder.run({ token_ids: i64(ids, [1, length]) });
  const { x: first, ...given } = await sessions.condition.run({ ...text, rows: i64([0, 1], [2]) });
  let x = first, done = 0, past = {};
  const final = sides.at(-1), channels = vae.latent_channels, heads = predictor.num_heads;
  for (let i = 0; i < predictor.depth; i++)
    for (const kind of "kv")
      past[`past_${kind}_${i}`] = f32([], [2, heads, 0, predictor.width / heads]);
  let latent = f32(filled(channels * final ** 2, 0), [1, channels, final, final]);
  for (const [scale, side] of sides.entries()) {
    const cells = side ** 2, positions = filled(cells, 0).map((_, i) => done + i);
    const feeds = { x, positions: i64(positions, [cells]), ...given, ...past };
    const { logits, ...made } = await sessions.step.run(feeds);
    past = Object.fromEntries(Object.entries(made).map(([n, t]) => [n.replace("new", "past"), t]));
    const ratio = scale / (sides.length - 1);
    const strength = 1 + (manifest.sampling.guidance_scale - 1) * ratio;
    const { codes } = await sessions.select.run({
      logits, guidance: f32([strength], [1]), temperature: f32([1], [1]), top_p: f32([1], [1]),
      uniforms: f32(filled(cells, 0), [1, cells]), forced: i64(filled(cells, -1), [1, cells]),
      top_k: i64([1], [1]), ranks: i64([0], [1]),
    });
    const up = bicubic(side, final), down = area(final, sides[(scale + 1) % sides.length]);
    const grown = await sessions.accumulate.run({
      codes: codes.reshape([1, side, side, channels]), latent, rows: i64([0, 0], [2]),
      up_rows: up, up_cols: up, down_rows: down, down_cols: down, phi: i64([nearest(ratio)], []),
    });
    (latent = grown.new_latent), (x = grown.x), (done += cells);
    yield (await sessions.decoder.run({ latent })).image;
  }
}

function show(image) {
  const [, , height, width] = image.dims, plane = height * width, canvas = document.getElementById("picture");
  const pixels = new Uint8ClampedArray(4 * plane).fill(255);
  for (let i = 0; i < plane; i++)
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = Math.round(image.data[c * plane + i] * 255);
  (canvas.width = width), (canvas.height = height);
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

async function draw(event) {
  event?.preventDefault();
  const start = performance.now();
  let number = 0;
  for await (const image of scales(document.getElementById("prompt").value)) {
    show(image);
    state.textContent = `scale ${++number} of ${sides.length}`;
  }
  state.textContent = `done in ${Math.round(performance.now() - start)} ms`;
}
document.forms[0].addEventListener("submit", draw);
state.textContent = "ready";
