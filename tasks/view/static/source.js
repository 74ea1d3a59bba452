// Where the page's data comes from: the server that sent it, or, in an exported page, scripts beside it. Both answer the same questions.
"use strict";

var medvl = medvl || {};

/** Bytes of a base64 text. */
medvl.bytes = function (text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
};

/** What gzipped bytes hold, as an ArrayBuffer. */
medvl.unpacked = function (bytes) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
};

medvl.ServerSource = class {
  canOpen = true;

  async ask(path, options) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server does not answer; is `medvl view` still running?");
    }
    if (!answer.ok) {
      const told = await answer.json().catch(() => ({}));
      throw new Error(told.error || `the server answered ${answer.status}`);
    }
    return answer;
  }

  async json(path, options) {
    return (await this.ask(path, options)).json();
  }

  state() {
    return this.json("api/state");
  }

  study(study) {
    return this.json(`api/studies/${study}`);
  }

  async image(study) {
    return (await this.ask(`api/studies/${study}/image`)).arrayBuffer(); // the browser has unpacked it
  }

  scores(study, model) {
    return this.json(`api/studies/${study}/scores?model=${model}`);
  }

  map(study, model, query, signal) {
    const asked = new URLSearchParams({ model, [query.kind]: query.what });
    return this.json(`api/studies/${study}/map?${asked}`, { signal });
  }

  async open(files, told) {
    const { drop } = await this.json("api/drops", { method: "POST" });
    for (const [i, file] of files.entries()) {
      told(`Reading ${i + 1} of ${files.length}`);
      await this.ask(`api/drops/${drop}?${new URLSearchParams({ name: file.name })}`, { method: "PUT", body: file });
    }
    return this.json(`api/drops/${drop}`, { method: "POST" });
  }
};

medvl.StaticSource = class {
  canOpen = false;
  waiting = new Map();

  constructor(state) {
    this.all = state;
    medvl.takeStudy = (number, study) => this.waiting.get(number)(study);
    this.studies = new Map();
  }

  async state() {
    return this.all;
  }

  load(study) {
    if (!this.studies.has(study)) {
      this.studies.set(study, new Promise((resolve, reject) => {
        this.waiting.set(study, resolve);
        const script = document.createElement("script");
        script.src = `study-${study}.js`;
        script.onerror = () => reject(new Error(`study-${study}.js is missing beside this page`));
        document.head.append(script);
      }));
    }
    return this.studies.get(study);
  }

  async study(study) {
    return (await this.load(study)).info;
  }

  async image(study) {
    return medvl.unpacked(medvl.bytes((await this.load(study)).image));
  }

  async scores(study, model) {
    return (await this.load(study)).models[model].scores;
  }

  async map(study, model, query) {
    const maps = (await this.load(study)).models[model].maps;
    const found = maps.find((one) => one.kind === query.kind && one.what.toLowerCase() === query.what.toLowerCase());
    if (!found) {
      const phrases = maps.filter((one) => one.kind === "phrase").map((one) => one.what);
      throw new Error("this exported page has no map of that; " + (phrases.length ? `its phrases are: ${phrases.join("; ")}` : "choose a finding"));
    }
    return found;
  }
};
