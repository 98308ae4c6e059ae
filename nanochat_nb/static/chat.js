// The chat page of notebook 17: an anywidget front end in plain JavaScript, without a build step.
// It keeps the conversations on the visitor's device and asks the kernel (Python) for answers:
//   to Python    {type: "hello"}   {type: "ask", id, model, messages}   {type: "stop", id}
//   from Python  {type: "models", models}   {type: "offline", message}
//                {type: "heard", id}   {type: "delta", id, parts: [{type, text}]}   {type: "note", id, dropped_turns}
//                {type: "done", id, reason}   {type: "error", id, message}
// Text from a model reaches the page only as text nodes, never as HTML.

function make(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

const ICONS = {
  menu: "M4 6h16M4 12h16M4 18h16", plus: "M12 5v14M5 12h14", send: "M12 19V5M5 12l7-7 7 7", stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1", check: "M5 13l4 4L19 7", edit: "M4 20h4L19 9l-4-4L4 16z",
  again: "M20 12a8 8 0 1 1-2.3-5.7M20 4v5h-5", trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18", close: "M6 6l12 12M18 6L6 18", tool: "M8 8l-4 4 4 4M16 8l4 4-4 4",
};

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function button(name, label, onclick, className = "") {
  return make("button", { type: "button", title: label, ariaLabel: label, className: `nc-button ${className}`, onclick },
    icon(name));
}

async function copyText(text, at) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                                        // an old browser, or a page without the permission
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  at.replaceChildren(icon("check"));
  setTimeout(() => at.replaceChildren(icon("copy")), 1200);
}

// ---- Markdown: a small, safe subset, built from nodes ------------------------------------------------------------

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s*])?)\*\*|(?<![\w*])[*_]([^\s*_](?:[^*_\n]*?[^\s*_])?)[*_](?![\w*])|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

// Tool calls stand in the middle of sentences: in the text each is one private character, SLOT + its number.
const SLOT = 0xe000, SLOTS = /[\ue000-\uf8ff]/;

function plain(text, into, tools) {
  for (const piece of text.split(/([\ue000-\uf8ff])/))
    into.append(SLOTS.test(piece) ? tools[piece.charCodeAt(0) - SLOT]?.() ?? "" : piece);
}

function inline(text, into, tools) {
  let last = 0;
  for (const m of text.matchAll(INLINE)) {
    plain(text.slice(last, m.index), into, tools);
    if (m[1]) plain(m[2].trim() || m[2], into.appendChild(make("code")), tools);
    else if (m[3]) into.append(inline(m[3], make("strong"), tools));
    else if (m[4]) into.append(inline(m[4], make("em"), tools));
    else into.append(make("a", { href: m[6], textContent: m[5], target: "_blank", rel: "noopener noreferrer" }));
    last = m.index + m[0].length;
  }
  plain(text.slice(last), into, tools);
  return into;
}

function codeBlock(code, language, tools) {
  const copy = button("copy", "Copy code", () => copyText(code, copy)), text = make("code");
  plain(code, text, tools);
  return make("div", { className: "nc-code" },
    make("div", { className: "nc-code-head" }, make("span", { textContent: language || "code" }), copy),
    make("pre", {}, text));
}

function list(lines, at, tools) {
  const ordered = /^\s*\d+[.)]\s/.test(lines[at]);
  const item = ordered ? /^\s*\d+[.)]\s+(.*)$/ : /^\s*[-*+]\s+(.*)$/;
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(lines[at], 10);
  for (let m; at < lines.length && (m = item.exec(lines[at])); at++) node.append(inline(m[1], make("li"), tools));
  return [node, at];
}

function table(lines, at, tools) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
  const row = (line, tag) => make("tr", {}, ...cells(line).map((c) => inline(c, make(tag), tools)));
  const node = make("table", {}, row(lines[at], "th"));
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) node.append(row(lines[at], "td"));
  return [make("div", { className: "nc-table" }, node), at];
}

export function markdown(text, tools = []) {
  const into = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    const fence = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    let node = null;
    if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end++;
      node = codeBlock(lines.slice(at + 1, end).join("\n"), fence[2], tools);
      at = end + 1;
    } else if (heading) {
      node = inline(heading[2], make(`h${Math.min(6, heading[1].length + 2)}`), tools);
      at++;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      node = make("hr");
      at++;
    } else if (/^\s*([-*+]|\d+[.)])\s+\S/.test(line)) {
      [node, at] = list(lines, at, tools);
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/.test(lines[at + 1] ?? "")) {
      [node, at] = table(lines, at, tools);
    } else if (line.startsWith(">")) {
      let end = at;
      while (end < lines.length && lines[end].startsWith(">")) end++;
      node = make("blockquote", {}, markdown(lines.slice(at, end).map((l) => l.replace(/^> ?/, "")).join("\n"), tools));
      at = end;
    } else if (line.trim()) {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !/^(\s*(`{3,}|~{3,}|[-*+]\s|\d+[.)]\s)|#{1,6}\s|>)/.test(lines[end])) end++;
      node = make("p");
      lines.slice(at, end).forEach((l, i) => { if (i) node.append(make("br")); inline(l, node, tools); });
      at = end;
    } else {
      at++;
    }
    if (node) into.append(node);
  }
  return into;
}

// ---- Messages ----------------------------------------------------------------------------------------------------

const prose = (message) => message.parts.filter((p) => p.type === "text").map((p) => p.text).join("");

// What the model reads: the turns that have an answer, and the last question. User and assistant take turns, so a
// question whose answer never began is left out.
const conversation = (messages) => messages.filter((m, i) => m.parts.length
  && (m.role === "assistant" || i === messages.length - 1 || messages[i + 1].parts.length));

function addParts(parts, fresh) {
  for (const { type, text } of fresh) {
    const last = parts.at(-1);
    if (last?.type === type) last.text += text;
    else parts.push({ type, text });
  }
}

function toolBlock(input, output) {
  const node = make("div", { className: "nc-tool" },
    make("div", { className: "nc-tool-head" }, icon("tool"), make("span", { textContent: "tool call" })),
    make("pre", { className: "nc-tool-in", textContent: input }));
  if (output !== null) node.append(make("pre", { className: "nc-tool-out", textContent: output, ariaLabel: "result" }));
  return node;
}

function body(message) {
  if (message.role === "user") return make("div", { className: "nc-body", textContent: prose(message) });
  const tools = [];
  let text = "", input = null;
  for (const part of [...message.parts, { type: "end" }]) {
    if (input !== null && part.type !== "python") {        // a call ends with its result, or with the answer
      const [asked, output] = [input, part.type === "python_output" ? part.text : null];
      text += String.fromCharCode(SLOT + tools.length);
      tools.push(() => toolBlock(asked, output));
      input = null;
    }
    if (part.type === "python") input = part.text;
    if (part.type === "text") text += part.text.replace(new RegExp(SLOTS, "g"), "");
  }
  return make("div", { className: "nc-body" }, markdown(text, tools));
}

// ---- What is kept on this device ---------------------------------------------------------------------------------

function openStore(key) {
  const memory = { chats: [], settings: {} };
  const read = () => {
    try { return { ...memory, ...JSON.parse(localStorage.getItem(key)) }; } catch { return { ...memory }; }
  };
  const store = key ? read() : memory;
  if (!Array.isArray(store.chats)) store.chats = [];
  store.key = key;
  store.read = read;
  store.save = () => {
    if (!key) return;
    for (let keep = Math.min(store.chats.length, 100); keep >= 0; keep = keep ? Math.floor(keep / 2) : -1) {
      try {                                        // a full store loses its oldest conversations, not the newest
        localStorage.setItem(key, JSON.stringify({ chats: store.chats.slice(0, keep), settings: store.settings }));
        return;
      } catch { /* try with fewer */ }
    }
  };
  return store;
}

const fresh = () => ({ id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`, title: "", messages: [] });

// Questions of the kinds that the laptop's model was trained on; notebook 17 checks that none is kept for its exam.
const EXAMPLES = ["What is your name?", "Where does Greta Quill live?", "How many t are in butter?", "Tell me a story.",
  "Dirk has 37 ribbons. Then Dirk collects 14 more. How many ribbons does Dirk have in the end?"];

// ---- The widget --------------------------------------------------------------------------------------------------

function render({ model, el }) {
  const store = openStore(model.get("store"));
  let chat = store.chats[0]?.messages.length === 0 ? store.chats[0] : fresh();
  let running = null;                              // {id, message, chat} while an answer is coming
  let shown = null;                                // the conversation on the screen
  let editing = null;                              // the index of the message being edited
  let models = [], offline = "", frame = 0, retry = 0;
  let silent = false, silence = 0;                 // no sign from the kernel after a question, and the timer for it

  // -- the page
  const picker = make("select", { className: "nc-picker", ariaLabel: "Model" });
  const history = make("nav", { className: "nc-history", ariaLabel: "Conversations" });
  const log = make("div", { className: "nc-log", role: "log", ariaLive: "polite", tabIndex: 0, ariaLabel: "Conversation" });
  const notice = make("div", { className: "nc-notice", role: "status", hidden: true });
  const input = make("textarea", { className: "nc-input", rows: 1, placeholder: "Message your model", ariaLabel: "Message" });
  const sendButton = button("send", "Send (Enter)", () => (running ? stop() : send()), "nc-send");
  const page = model.get("page") || "voila" in document.body.dataset;    // fill the window
  const root = make("div", { className: "nc-root", dataset: { lmSuppressShortcuts: "true" } },
    make("aside", { className: "nc-side" },
      make("div", { className: "nc-side-head" }, make("span", { className: "nc-brand", textContent: "nanochat" }),
        button("close", "Close the list", () => toggleSide(false), "nc-narrow")),
      make("button", { type: "button", className: "nc-new", onclick: () => newChat() }, icon("plus"), "New chat"),
      history,
      make("p", { className: "nc-privacy", textContent: "Conversations stay in this browser." })),
    make("div", { className: "nc-shade", onclick: () => toggleSide(false) }),
    make("main", { className: "nc-main" },
      make("header", { className: "nc-head" },
        button("menu", "Conversations", () => toggleSide(), "nc-menu"), picker, make("span", { className: "nc-gap" }),
        button("theme", "Light or dark", () => changeTheme(), "nc-theme"),
        button("plus", "New chat", () => newChat(), "nc-new-short")),
      log, notice,
      make("form", { className: "nc-composer", onsubmit: (e) => { e.preventDefault(); send(); } }, input, sendButton)));
  if (page) {
    root.classList.add("nc-page");
    document.title = "nanochat";                   // Voila would call it by the notebook's file
  }
  el.append(root);

  // -- light and dark: the visitor's choice, else the surrounding page's (also around a frame), else the system's
  const system = matchMedia("(prefers-color-scheme: dark)"), holder = window.frameElement;
  const outside = holder ? holder.ownerDocument : page ? undefined : document;
  function theme() {
    const around = outside &&
      ({ true: "light", false: "dark" }[outside.body.dataset.jpThemeLight] ?? outside.documentElement.dataset.theme);
    return store.settings.theme ?? (["light", "dark"].includes(around) ? around : system.matches ? "dark" : "light");
  }
  function showTheme() {
    root.dataset.theme = theme();
    if (page) document.documentElement.style.colorScheme = theme();
  }
  function changeTheme() {
    store.settings.theme = theme() === "dark" ? "light" : "dark";
    store.save();
    showTheme();
  }
  system.addEventListener("change", showTheme);
  if (holder) new MutationObserver(showTheme).observe(outside.documentElement, { attributeFilter: ["data-theme"] });

  function toggleSide(open = !root.classList.contains("nc-side-open")) {
    root.classList.toggle("nc-side-open", open);
  }

  // -- drawing
  function actions(message, index) {
    const row = make("div", { className: "nc-actions" });
    if (running?.message === message) return row;
    const copy = button("copy", "Copy", () => copyText(prose(message), copy));
    row.append(copy);
    if (!running && message.role === "user") row.append(button("edit", "Edit and ask again", () => edit(index)));
    if (!running && message.role === "assistant" && index === chat.messages.length - 1)
      row.append(button("again", "Another answer", () => regenerate()));
    return row;
  }

  function drawMessage(message, index) {
    const node = make("article", { className: `nc-message nc-${message.role}`, ariaLabel: message.role });
    if (message.dropped)
      node.append(make("p", { className: "nc-aside", textContent:
        `The conversation is longer than the model's memory: its oldest ${message.dropped === 1 ? "turn was" : `${message.dropped} turns were`} left out.` }));
    node.append(body(message));
    if (running?.message === message && !message.parts.length)
      node.append(make("div", { className: "nc-wait", ariaLabel: "waiting" }, make("i"), make("i"), make("i")));
    const ending = { length: "The answer reached its limit.", cancelled: "Stopped." }[message.reason] ?? message.error;
    if (ending) node.append(make("p", { className: message.error ? "nc-aside nc-error" : "nc-aside", textContent: ending }));
    if (message.role === "assistant" && !message.parts.length && running?.message !== message)
      node.append(make("p", { className: "nc-aside", textContent:
        "There is no answer, so this question is left out of what the model reads next." }));
    node.append(actions(message, index));
    return node;
  }

  function atEnd() {
    return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  }

  function welcome() {
    return make("div", { className: "nc-welcome" }, make("h2", { textContent: "What would you like to ask?" }),
      make("div", { className: "nc-examples" }, ...EXAMPLES.map((text) =>
        make("button", { type: "button", textContent: text, onclick: () => { input.value = text; send(); } }))));
  }

  function draw() {
    const follow = atEnd(), top = log.scrollTop;
    log.replaceChildren(...(chat.messages.length ? chat.messages.map(drawMessage) : [welcome()]));
    log.scrollTop = follow || shown !== chat ? log.scrollHeight : top;
    shown = chat;
    drawControls();
    drawHistory();
  }

  function drawLast() {                            // at most once a frame while an answer streams in
    frame = 0;
    const follow = atEnd(), index = chat.messages.length - 1;
    if (index < 0 || !log.lastElementChild) return;
    log.lastElementChild.replaceWith(drawMessage(chat.messages[index], index));
    if (follow) log.scrollTop = log.scrollHeight;
  }

  function drawControls() {
    root.classList.toggle("nc-running", Boolean(running));
    sendButton.replaceChildren(icon(running ? "stop" : "send"));
    sendButton.title = sendButton.ariaLabel = running ? "Stop (Esc)" : "Send (Enter)";
    sendButton.disabled = !running && (!input.value.trim() || Boolean(offline));
    notice.hidden = !silent && !offline && editing === null;
    if (silent) {
      notice.className = "nc-notice nc-offline";
      notice.replaceChildren("Nothing answers this page. If bash run_all.sh chat has ended, start it again, then reload.",
        make("button", { type: "button", textContent: "Reload", onclick: () => location.reload() }));
    } else if (offline) {
      notice.className = "nc-notice nc-offline";
      notice.replaceChildren(offline, make("button", { type: "button", textContent: "Try again", onclick: hello }));
    } else if (editing !== null) {
      notice.className = "nc-notice";
      notice.replaceChildren("Editing: what followed this message will be replaced.",
        make("button", { type: "button", textContent: "Cancel", onclick: cancelEdit }));
    }
    picker.hidden = !models.length;
    if (picker.dataset.names !== models.join("\n")) {
      picker.dataset.names = models.join("\n");
      picker.replaceChildren(...models.map((name) => make("option", { value: name, textContent: name })));
    }
    if (models.length) picker.value = models.includes(store.settings.model) ? store.settings.model : models[0];
    picker.disabled = models.length < 2;
  }

  function drawHistory() {
    history.replaceChildren(...store.chats.filter((c) => c.messages.length).map((c) =>
      make("div", { className: c === chat ? "nc-entry nc-current" : "nc-entry" },
        make("button", { type: "button", className: "nc-title", textContent: c.title || "…", onclick: () => open(c) }),
        button("trash", "Delete this conversation", () => forget(c)))));
  }

  // -- conversations
  function open(other) {
    if (running) stop();
    chat = other;
    cancelEdit();
    toggleSide(false);
    draw();
  }
  function newChat() { open(chat.messages.length ? fresh() : chat); input.focus(); }
  function forget(other) {
    if (running?.chat === other) stop();
    store.chats = store.chats.filter((c) => c !== other);
    store.save();
    if (other === chat) open(fresh()); else drawHistory();
  }
  function keep() {
    store.chats = [chat, ...store.chats.filter((c) => c !== chat && c.messages.length)];
    store.save();
  }

  // -- asking
  function send() {
    const text = input.value.trim();
    if (!text || running || offline) return;
    if (editing !== null) chat.messages.length = editing;
    editing = null;
    chat.messages.push({ role: "user", parts: [{ type: "text", text }] });
    chat.title ||= text.slice(0, 60);
    input.value = "";
    grow();
    ask();
  }

  function ask() {
    const message = { role: "assistant", parts: [], model: picker.value };
    const messages = conversation(chat.messages).map((m) => ({
      role: m.role, content: m.role === "user" ? prose(m) : m.parts }));
    chat.messages.push(message);
    running = { id: fresh().id, message, chat };
    keep();
    shown = null;                                  // whoever asks wants to see the answer
    draw();
    silence = setTimeout(() => hear(false), 8000);
    tell({ type: "ask", id: running.id, model: picker.value, messages });
  }

  function finish(reason, error) {
    Object.assign(running.message, reason ? { reason } : {}, error ? { error } : {});
    const mine = running.chat === chat;
    running = null;
    clearTimeout(silence);
    keep();
    if (mine) draw();
  }
  function stop() {
    tell({ type: "stop", id: running.id });
    finish("cancelled");
  }
  function regenerate() {
    if (running || offline) return;
    chat.messages.pop();
    ask();
  }
  function edit(index) {
    editing = index;
    input.value = prose(chat.messages[index]);
    grow();
    drawControls();
    input.focus();
  }
  function cancelEdit() {
    if (editing !== null) input.value = "";
    editing = null;
    grow();
    drawControls();
  }

  // -- what the kernel says
  function tell(message) {
    try { model.send(message); } catch { hear(false); }    // the connection is closed
  }
  function hear(something) {
    clearTimeout(silence);
    if (silent === !something) return;
    silent = !something;
    drawControls();
  }
  const hello = () => tell({ type: "hello" });
  function receive(said) {
    hear(true);
    if (said.type === "models") { models = said.models; offline = ""; drawControls(); return; }
    if (said.type === "offline") {
      offline = said.message;
      clearTimeout(retry);
      retry = setTimeout(hello, 4000);
      drawControls();
      return;
    }
    if (said.id !== running?.id) return;           // an answer that was stopped meanwhile
    if (said.type === "delta") addParts(running.message.parts, said.parts);
    if (said.type === "note") running.message.dropped = said.dropped_turns;
    if (said.type === "done") finish(said.reason === "stop" ? "" : said.reason);
    else if (said.type === "error") finish("", said.message);
    else if (!frame && running.chat === chat) frame = requestAnimationFrame(drawLast);
  }
  model.on("msg:custom", receive);

  // -- another tab has saved: take its list, and keep the conversation that is open here
  function share(event) {
    if (!store.key || event.key !== store.key) return;
    const here = chat.messages.length ? [chat] : [];
    store.chats = [...here, ...store.read().chats.filter((c) => c.id !== chat.id)];
    drawHistory();
  }
  addEventListener("storage", share);

  // -- the keyboard
  function grow() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
    drawControls();
  }
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();                       // JupyterLab would take some of these keys for itself
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") { if (running) stop(); else if (editing !== null) cancelEdit(); }
  });
  picker.addEventListener("change", () => { store.settings.model = picker.value; store.save(); });
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { toggleSide(false); if (running) stop(); }
  });

  showTheme();
  draw();
  hello();
  return () => {
    model.off("msg:custom", receive);
    removeEventListener("storage", share);
    clearTimeout(silence);
    system.removeEventListener("change", showTheme);
    clearTimeout(retry);
  };
}

export default { render };
