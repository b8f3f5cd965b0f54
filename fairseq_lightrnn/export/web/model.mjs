// An exported model in a browser: the same words, graphs and searches as fairseq_lightrnn/runtime.

import * as ort from "./onnxruntime/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./onnxruntime/", import.meta.url).href;

const BLOCK = 32; // as in runtime/vocabulary.py
const END = 0x0a;
const FIRST_ROUND = 4;
const LAST_ROUND = 256;
const SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]; // what nobody types

async function fetched(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

async function checked(name, digest) {
  const content = await fetched(name);
  // Only pages from this machine or over https have the means to check.
  if (globalThis.crypto?.subtle) {
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
    const found = Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (found !== digest) throw new Error(`${name}: is damaged, or of another export`);
  }
  return content;
}

// Reads an .npz of unsigned bytes: planes of integers, the lowest bytes first.
async function unpack(content) {
  const view = new DataView(content);
  let end = content.byteLength - 22;
  while (view.getUint32(end, true) !== 0x06054b50) end--;
  const arrays = {};
  let entry = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const packed = view.getUint32(entry + 20, true);
    const nameLength = view.getUint16(entry + 28, true);
    const skipped = view.getUint16(entry + 30, true) + view.getUint16(entry + 32, true);
    const local = view.getUint32(entry + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(content, entry + 46, nameLength));
    const start =
      local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const stream = new Blob([content.slice(start, start + packed)])
      .stream()
      .pipeThrough(new DecompressionStream("deflate-raw"));
    arrays[name.replace(/\.npy$/, "")] = integers(await new Response(stream).arrayBuffer());
    entry += 46 + nameLength + skipped;
  }
  return arrays;
}

function integers(npy) {
  const length = new DataView(npy).getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(npy, 10, length));
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((s) => s.trim());
  const planes = Number(shape[0]);
  const bytes = new Uint8Array(npy, 10 + length);
  if (planes === 1) return bytes;
  const size = bytes.length / planes;
  const result = new Int32Array(size);
  for (let plane = 0; plane < planes; plane++) {
    for (let i = 0; i < size; i++) result[i] |= bytes[plane * size + i] << (8 * plane);
  }
  return result;
}

// Cells that words are read by in further tables, one table after the other: runtime/cells.py.
function furtherCells(arrays, tables, size) {
  const words = arrays.cells.length;
  const result = new Int32Array(tables * words);
  if (!tables) return result;
  const { in_order: inOrder, further_cells: stored, empty_cells: empty } = arrays;
  const others = stored.length / tables;
  for (let table = 0; table < tables; table++) {
    const taken = new Uint8Array(size);
    const some = stored.subarray(table * others, (table + 1) * others);
    for (const cell of some) taken[cell] = 1;
    const perTable = size - words;
    for (const cell of empty.subarray(table * perTable, (table + 1) * perTable)) taken[cell] = 1;
    let other = 0;
    let left = 0;
    for (let word = 0; word < words; word++) {
      if (!inOrder[word]) {
        result[table * words + word] = some[other++];
        continue;
      }
      while (taken[left]) left++;
      result[table * words + word] = left++;
    }
  }
  return result;
}

// Those that they are predicted by: other ones for words that moved.
function cellsInForce({ moved, moved_cells: cells }, read) {
  if (!moved) return read;
  let next = 0;
  return read.map((cell, place) => (moved[place] ? cells[next++] : cell));
}

function compare(one, two) {
  const length = Math.min(one.length, two.length);
  for (let i = 0; i < length; i++) if (one[i] !== two[i]) return one[i] - two[i];
  return one.length - two.length;
}

// How many of `count` sorted things are below some bytes; or not above them.
function bisect(count, at, bytes, right) {
  let low = 0;
  let high = count;
  while (low < high) {
    const middle = (low + high) >> 1;
    const order = compare(at(middle), bytes);
    if (order < 0 || (right && order === 0)) low = middle + 1;
    else high = middle;
  }
  return low;
}

export class Vocabulary {
  constructor(shared, rest) {
    this.shared = shared;
    this.rest = rest;
    this.length = shared.length;
    this.ends = new Int32Array(shared.length);
    let number = 0;
    for (let i = 0; i < rest.length; i++) if (rest[i] === END) this.ends[number++] = i;
  }

  start(number) {
    return number ? this.ends[number - 1] + 1 : 0;
  }

  block(block) {
    const words = [];
    let before = new Uint8Array(0);
    const last = Math.min(this.length, (block + 1) * BLOCK);
    for (let number = block * BLOCK; number < last; number++) {
      const rest = this.rest.subarray(this.start(number), this.ends[number]);
      const word = new Uint8Array(this.shared[number] + rest.length);
      word.set(before.subarray(0, this.shared[number]));
      word.set(rest, this.shared[number]);
      words.push(word);
      before = word;
    }
    return words;
  }

  word(number) {
    const block = Math.floor(number / BLOCK);
    return new TextDecoder().decode(this.block(block)[number - block * BLOCK]);
  }

  rank(bytes, right) {
    const head = (block) =>
      this.rest.subarray(this.start(block * BLOCK), this.ends[block * BLOCK]);
    const block = bisect(Math.ceil(this.length / BLOCK), head, bytes, right) - 1;
    if (block < 0) return 0;
    const words = this.block(block);
    return block * BLOCK + bisect(words.length, (i) => words[i], bytes, right);
  }

  find(word) {
    const number = this.rank(new TextEncoder().encode(word), true) - 1;
    return number >= 0 && this.word(number) === word ? number : null;
  }

  withPrefix(prefix) {
    const bytes = new TextEncoder().encode(prefix);
    return [this.rank(bytes, false), this.rank(Uint8Array.of(...bytes, 0xff), false)];
  }
}

export class Model {
  static async load() {
    const description = JSON.parse(new TextDecoder().decode(await fetched("model.json")));
    const files = {};
    await Promise.all(
      Object.entries(description.files).map(async ([name, entry]) => {
        files[name] = await checked(name, entry.sha256);
      }),
    );
    const model = new Model();
    const arrays = await unpack(files["words.npz"]);
    model.description = description;
    model.vocabulary = new Vocabulary(arrays.shared, arrays.rest);
    model.sessions = {};
    for (const name of Object.keys(files).filter((name) => name.endsWith(".onnx"))) {
      model.sessions[name.replace(".onnx", "")] = await ort.InferenceSession.create(
        new Uint8Array(files[name]),
      );
    }
    await model.seat(arrays);
    return model;
  }

  async seat(arrays) {
    const { shape, composition, layers, width, network } = this.description.model;
    const { hidden_size: hiddenSize = width } = this.description.model;
    const recurrent = composition === "recurrent";
    Object.assign(this, { shape, layers, width, hiddenSize, recurrent });
    this.lookBack = network === "transformer";
    this.size = shape.reduce((sum, size) => sum + size, 0);
    this.columns = shape[shape.length - 1];
    this.cells = arrays.cells;
    this.inputCells = arrays.input_cells ?? arrays.cells;
    const total = shape.reduce((product, size) => product * size, 1);
    this.words = new Int32Array(total).fill(-1);
    for (let word = 0; word < this.cells.length; word++) this.words[this.cells[word]] = word;
    this.tables = this.description.model.further_tables;
    const further = furtherCells(arrays, this.tables, total);
    const inForce = cellsInForce(arrays, further);
    this.seats = this.seatsOf(inForce);
    this.inputSeats = inForce === further ? this.seats : this.seatsOf(further);
    if (this.sessions.bias) {
      const every = Int32Array.from(this.cells, (_, word) => word);
      this.bias = (await this.run("bias", { words: [every, [every.length]] })).bias.data;
    }
  }

  // Where words' vectors of further tables are, word by word.
  seatsOf(cells) {
    const { shape, tables } = this;
    const components = shape.length;
    const words = this.cells.length;
    const seats = new Int32Array(words * tables * components);
    for (let word = 0; word < words; word++) {
      for (let table = 0; table < tables; table++) {
        const place = this.coordinates(cells[table * words + word]);
        let start = table * this.size;
        for (let i = 0; i < components; i++) {
          seats[(word * tables + table) * components + i] = start + place[i];
          start += shape[i];
        }
      }
    }
    return seats;
  }

  coordinates(cell) {
    const result = [];
    for (let i = this.shape.length - 1; i >= 0; i--) {
      result.unshift(cell % this.shape[i]);
      cell = Math.floor(cell / this.shape[i]);
    }
    return result;
  }

  number(prefix) {
    return prefix.reduce((number, value, i) => number * this.shape[i] + value, 0);
  }

  run(name, inputs) {
    const feeds = {};
    for (const [input, [data, dims]] of Object.entries(inputs)) {
      const kind = data instanceof Int32Array ? "int32" : "float32";
      feeds[input] = new ort.Tensor(kind, data, dims);
    }
    return this.sessions[name].run(feeds);
  }

  begin() {
    const output = new Float32Array(this.width);
    if (this.lookBack) return { output, slots: [] };
    const zeros = new Float32Array(this.layers * this.hiddenSize);
    return { hidden: zeros, cell: zeros, output };
  }

  // What a transformer reads one more word with: see runtime/memory.py. Texts share their slots.
  lookedBackOn(slots, word) {
    const { embed_dim: dim, positions } = this.description.model;
    const shown = Number(word !== this.description.padding);
    const seen = Float32Array.from(slots, (slot) => slot.shown);
    if (seen.reduce((sum, one) => sum + one, shown) > positions) {
      throw new Error(
        `A text of more than ${positions} words, its beginning included, is longer than the ` +
          "model can look back on.",
      );
    }
    const stacked = (name) => {
      const result = new Float32Array(this.layers * slots.length * dim);
      slots.forEach((slot, n) => {
        for (let layer = 0; layer < this.layers; layer++) {
          const vector = slot[name].subarray(layer * dim, (layer + 1) * dim);
          result.set(vector, (layer * slots.length + n) * dim);
        }
      });
      return [result, [1, this.layers, slots.length, dim]];
    };
    return {
      keys: stacked("keys"),
      values: stacked("values"),
      seen: [seen, [1, slots.length]],
      shown: [Float32Array.of(shown), [1, 1]],
    };
  }

  // Reads steps of vectors: `places` (N·T·P) of N texts, with states (N, layers, d).
  async readPlaces(texts, steps, places, numbers, hidden, cell) {
    const state = [texts, this.layers, this.hiddenSize];
    const inputs = {
      places: [places, [texts, steps, places.length / texts / steps]],
      hidden: [hidden, state],
      cell: [cell, state],
    };
    if (numbers) inputs.numbers = [numbers, [texts, steps, numbers.length / texts / steps]];
    const found = await this.run("read", inputs);
    return [found.outputs.data, found.next_hidden.data, found.next_cell.data];
  }

  async numbersOf(words) {
    return (await this.run("numbers", { words: [words, [words.length]] })).numbers.data;
  }

  // The state after one more word.
  async read(state, word) {
    const components = this.shape.length;
    const own = this.coordinates(this.inputCells[word]);
    let start = 0;
    const places = own.map((value, i) => {
      const place = start + value;
      start += this.shape[i];
      return place;
    });
    const perWord = this.tables * components;
    const others = Array.from(
      this.inputSeats.subarray(word * perWord, (word + 1) * perWord),
      (seat) => this.size + seat,
    );
    const nothing = this.size * (1 + this.tables);
    const steps = this.recurrent ? components : 1;
    const flat = this.recurrent
      ? places.flatMap((place, i) => [
          place,
          ...(i === components - 1 ? others : others.map(() => nothing)),
        ])
      : [...places, ...others];
    let numbers = null;
    if (this.sessions.numbers) {
      const found = await this.numbersOf(Int32Array.of(word));
      this.ownNumbers = found.length;
      numbers = new Float32Array(steps * found.length);
      numbers.set(found, (steps - 1) * found.length);
    }
    if (this.lookBack) {
      const inputs = this.lookedBackOn(state.slots, word);
      inputs.places = [Int32Array.from(flat), [1, 1, flat.length]];
      if (numbers) inputs.numbers = [numbers, [1, 1, numbers.length]];
      const { outputs, more_keys: keys, more_values: values } = await this.run("read", inputs);
      const slot = { keys: keys.data, values: values.data, shown: inputs.shown[0][0] };
      return { output: outputs.data, slots: [...state.slots, slot] };
    }
    const [outputs, hidden, cell] = await this.readPlaces(
      1, steps, Int32Array.from(flat), numbers, state.hidden, state.cell,
    );
    return { hidden, cell, output: outputs.slice(-this.width) };
  }

  // What is added to the logits of the component after some prefixes.
  added(prefixes, component) {
    const size = this.shape[component];
    const below = this.shape.slice(component + 1).reduce((product, s) => product * s, 1);
    const result = new Float32Array(prefixes.length * size);
    prefixes.forEach((prefix, n) => {
      const first = this.number(prefix) * size;
      for (let value = 0; value < size; value++) {
        if (below === 1) {
          const word = this.words[first + value];
          result[n * size + value] = word < 0 ? -Infinity : (this.bias?.[word] ?? 0);
        } else {
          const cells = this.words.subarray((first + value) * below, (first + value + 1) * below);
          result[n * size + value] = cells.some((word) => word >= 0) ? 0 : -Infinity;
        }
      }
    });
    return [result, [prefixes.length, size]];
  }

  async first(state) {
    const found = await this.run("first", {
      outputs: [state.output, [1, this.width]],
      added: this.added([[]], 0),
    });
    const carried = {};
    for (const [name, tensor] of Object.entries(found)) {
      if (name !== "log_probs") carried[name] = { data: tensor.data, dims: tensor.dims.slice(1) };
    }
    if (this.recurrent) {
      const dims = [this.layers, this.hiddenSize];
      carried.hidden = { data: state.hidden, dims };
      carried.cell = { data: state.cell, dims };
    }
    return { logProbs: found.log_probs.data, carried };
  }

  // Log-probabilities after prefixes of the same length, with what each carries further.
  async extend(nodes) {
    const component = nodes[0].prefix.length;
    const prefixes = nodes.map((node) => node.prefix);
    const stacked = (name, from = 0, size) => {
      const { data, dims } = nodes[0].carried[name];
      const length = size ?? data.length;
      const result = new Float32Array(nodes.length * length);
      nodes.forEach((node, n) =>
        result.set(node.carried[name].data.subarray(from, from + length), n * length),
      );
      return [result, [nodes.length, ...(size ? [size] : dims)]];
    };
    const inputs = { added: this.added(prefixes, component) };
    let states = null;
    if (this.recurrent) {
      const nothing = this.size * (1 + this.tables);
      const per = 1 + this.tables * this.shape.length;
      const places = new Int32Array(nodes.length * per).fill(nothing);
      const start = this.shape.slice(0, component - 1).reduce((sum, size) => sum + size, 0);
      prefixes.forEach((prefix, n) => (places[n * per] = start + prefix[component - 1]));
      const numbers = this.sessions.numbers && new Float32Array(nodes.length * this.ownNumbers);
      states = await this.readPlaces(
        nodes.length, 1, places, numbers, stacked("hidden")[0], stacked("cell")[0],
      );
      inputs.hidden = [states[0], [nodes.length, this.width]];
    } else {
      inputs.hidden = stacked("projections", (component - 1) * this.width, this.width);
      inputs.prefix = [Int32Array.from(prefixes.flat()), [nodes.length, component]];
    }
    if (component + 1 === this.shape.length) await this.features(inputs, nodes, prefixes, stacked);
    const found = await this.run(`expand${component}`, inputs);
    const size = this.shape[component];
    return nodes.map((node, n) => {
      const carried = { ...node.carried };
      if (states) {
        const length = this.layers * this.hiddenSize;
        for (const [name, part] of [["hidden", states[1]], ["cell", states[2]]]) {
          const data = part.slice(n * length, (n + 1) * length);
          carried[name] = { data, dims: node.carried[name].dims };
        }
      }
      return { logProbs: found.log_probs.data.subarray(n * size, (n + 1) * size), carried };
    });
  }

  async features(inputs, nodes, prefixes, stacked) {
    const { query, scores } = nodes[0].carried;
    if (!query && !scores) return;
    const words = new Int32Array(nodes.length * this.columns);
    prefixes.forEach((prefix, n) => {
      const first = this.number(prefix) * this.columns;
      for (let i = 0; i < this.columns; i++) {
        words[n * this.columns + i] = Math.max(0, this.words[first + i]);
      }
    });
    if (query) {
      inputs.query = stacked("query");
      const numbers = await this.numbersOf(words);
      inputs.numbers = [numbers, [nodes.length, this.columns, numbers.length / words.length]];
    }
    if (scores) {
      const per = this.tables * this.shape.length;
      const seats = new Int32Array(words.length * per);
      words.forEach((word, i) =>
        seats.set(this.seats.subarray(word * per, (word + 1) * per), i * per),
      );
      inputs.scores = stacked("scores");
      inputs.seats = [seats, [nodes.length, this.columns, per]];
    }
  }

  // The most probable next words, exactly; of those in a range of numbers, if one is given.
  async topWords(state, count, range = null) {
    const [low, high] = range ?? [0, this.vocabulary.length];
    let best = [];
    let frontier = [];
    let opened = 0;
    const worst = () => (best.length < count ? -Infinity : best[best.length - 1].logProb);
    const leading = range && this.leading(low, high);
    const open = (prefix, bound, context) => {
      const last = prefix.length + 1 === this.shape.length;
      const first = this.number(prefix) * this.shape[prefix.length];
      for (let value = 0; value < this.shape[prefix.length]; value++) {
        const logProb = bound + context.logProbs[value];
        if (!(logProb >= worst()) || logProb === -Infinity) continue;
        if (!last) {
          if (leading && !leading[prefix.length].has(first + value)) continue;
          frontier.push({ prefix: [...prefix, value], bound: logProb, carried: context.carried });
          continue;
        }
        const word = this.words[first + value];
        if (word < 0 || word < low || word >= high) continue;
        best.push({ word, logProb });
        best.sort((a, b) => b.logProb - a.logProb || a.word - b.word);
        if (best.length > count) best.pop();
      }
    };
    open([], 0, await this.first(state));
    let width = FIRST_ROUND;
    while (true) {
      frontier = frontier
        .filter((node) => node.bound >= worst())
        .sort((a, b) => b.bound - a.bound);
      if (!frontier.length) break;
      const chosen = frontier.splice(0, width);
      opened += chosen.length;
      for (let length = 1; length < this.shape.length; length++) {
        const some = chosen.filter((node) => node.prefix.length === length);
        if (!some.length) continue;
        const contexts = await this.extend(some);
        some.forEach((node, n) => open(node.prefix, node.bound, contexts[n]));
      }
      width = Math.min(2 * width, LAST_ROUND);
    }
    const words = best.map(({ word, logProb }) => ({
      word: this.vocabulary.word(word),
      probability: Math.exp(logProb),
    }));
    return { words, opened };
  }

  // For each length, the numbers of the prefixes that lead to some words.
  leading(low, high) {
    const result = this.shape.slice(0, -1).map(() => new Set());
    for (let word = low; word < high; word++) {
      let number = Math.floor(this.cells[word] / this.columns);
      for (let i = this.shape.length - 2; i >= 0; i--) {
        result[i].add(number);
        number = Math.floor(number / this.shape[i]);
      }
    }
    return result;
  }

  // The words that share a word's row, and those that share its column.
  neighbours(number) {
    const cell = this.cells[number];
    const row = Math.floor(cell / this.columns);
    const names = (cells) =>
      cells
        .map((one) => this.words[one])
        .filter((word) => word >= 0 && word !== number)
        .map((word) => this.vocabulary.word(word));
    const inRow = Array.from({ length: this.columns }, (_, i) => row * this.columns + i);
    const inColumn = [];
    for (let one = cell % this.columns; one < this.words.length; one += this.columns) {
      inColumn.push(one);
    }
    return { coordinates: this.coordinates(cell), row: names(inRow), column: names(inColumn) };
  }
}

// A text that is typed: states after its whole words are kept, so that a key costs one word at most.
export class Typing {
  constructor(model) {
    this.model = model;
    this.states = [];
    this.words = [];
  }

  async begin() {
    let state = this.model.begin();
    for (const word of this.model.description.start) state = await this.model.read(state, word);
    this.states = [state];
  }

  async ask(text, count) {
    const tokens = text.split(/\s+/).filter((token) => token);
    const typed = /\S$/.test(text) ? tokens.pop() : "";
    let same = 0;
    while (same < tokens.length && tokens[same] === this.words[same]) same++;
    this.states.length = same + 1;
    this.words = tokens.slice(0, same);
    for (const token of tokens.slice(same)) {
      const number = this.model.vocabulary.find(token) ?? this.model.description.unknown;
      this.states.push(await this.model.read(this.states[this.states.length - 1], number));
      this.words.push(token);
    }
    const range = typed ? this.model.vocabulary.withPrefix(typed) : null;
    const state = this.states[this.states.length - 1];
    const { words, opened } = await this.model.topWords(state, count + SPECIAL.length, range);
    const typable = words.filter(({ word }) => !SPECIAL.includes(word));
    return { words: typable.slice(0, count), opened, typed };
  }
}
