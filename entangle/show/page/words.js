
// The description of a neuron, and the words that its weights read and write.
function inWords(header, name) {
  const box = make("div", { class: "words" }), text = header.descriptions[name], found = header.words[name];
  if (text) box.append(make("h4", {}, "Description"), make("p", {}, text));
  if (!found) {
    box.append(make("p", { class: "quiet" }, "To see which words the weights of this neuron read and write, run ", make("code", {}, `entangle words RUN ${name}`), " and write the report again."));
    return box;
  }
  box.append(make("h4", {}, "Words"), make("p", { class: "quiet" }, "Tokens with the largest and smallest products of weights and embeddings, and in brackets how many std from the mean over the vocabulary."));
  for (const one of found) {
    const through = one.through.length ? `, through ${one.through.join(" and ")}` : "";
    box.append(make("p", {}, make("strong", {}, one.side), ` (${one.what} ${one.neuron}${through})`));
    const list = make("ul");
    for (const [label, tokens] of [["most", one.top], ["least", one.bottom]]) {
      const line = make("li", {}, `${label}: `);
      tokens.forEach(([token, value, deviation], place) => {
        line.append(place ? ", " : "", make("code", {}, JSON.stringify(token)), ` ${short(value)} (${deviation > 0 ? "+" : ""}${deviation.toFixed(1)})`);
      });
      list.append(line);
    }
    box.append(list);
  }
  return box;
}
