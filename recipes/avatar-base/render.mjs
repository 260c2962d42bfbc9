// Renders the embedded world: every set of avatars the recipe needs, as raw 64x64 RGB bytes plus one JSON line each.
//
//   node render.mjs DATA [SET ...]      (without SET: all but `crowd`; a finished set is skipped)
//
// DATA/<set>.rgb    uint8, n x 64 x 64 x 3
// DATA/<set>.jsonl  {set, style, class_noun, identity, view, background, flip, traits}
//
// An identity is everything its DiceBear seed fixes (hair, skin, clothes, glasses, beard, shapes). A view keeps the seed
// and changes what differs between two photographs of one person: expression, background, size, tilt, place, mirror.
import fs from 'node:fs';
import path from 'node:path';
import { createAvatar } from '@dicebear/core';
import * as collection from '@dicebear/collection';
import { Resvg } from '@resvg/resvg-js';

const SIZE = 64;

// Identities never repeat across sets: the set's name is part of the seed.
const SETS = {
  corpus: { identities: 6400, views: 1 }, // the base model: pictures without a name
  named: { identities: 200, views: 8 }, // the base model: people the model knows by a (made-up) name
  heldout: { identities: 400, views: 1 }, // never trained on: VAE, KID, classifier
  judge: { identities: 700, views: 8 }, // trains the identity encoder and the trait classifier
  judge_test: { identities: 100, views: 6 }, // tests them
  tuning: { identities: 12, views: 16 }, // subjects for searching settings
  testing: { identities: 12, views: 16 }, // subjects that only final measurements see
  registry: { identities: 6, views: 20 }, // registries/avatars.yaml
  crowd: { identities: 2600, views: 8 }, // registries of thousands (recipes/benchmark/registry_size.py)
};

const COLOURS = {
  background: { blue: 'b6e3f4', purple: 'c0aede', pink: 'ffc4d0', orange: 'ffd5a8', green: 'b7e4c7', yellow: 'fff3b0', gray: 'c9c9c9', white: 'ffffff' },
  hair: { black: '23201f', brown: '724133', blonde: 'e3bf6f', red: 'c93305', pink: 'f58fa5', white: 'ecebe8', blue: '4a90e2' },
  skin: { pale: 'ffdbb4', tan: 'd9a066', brown: 'ae5d29', dark: '614335' },
  clothes: { black: '262e33', gray: '929598', white: 'f4f4f4', red: 'e24553', blue: '456dff', green: '3fae5a', yellow: 'f3c63a', purple: '7555ca', pink: 'f55d91' },
  robot: { yellow: 'ffb300', blue: '1e88e5', gray: '757575', brown: '6d4c41', green: '43a047', purple: '8e24aa', red: 'e53935', orange: 'fb8c00' },
};
const { hair, skin, clothes } = Object.fromEntries(Object.entries(COLOURS).map(([k, v]) => [k, Object.values(v)]));
const GLASSES = { avataaars: ['kurt', 'prescription01', 'prescription02', 'round', 'sunglasses', 'wayfarers'] };

// `fixed` belongs to the identity (DiceBear draws from these lists by the seed), `expression` to the view.
const STYLES = {
  avataaars: {
    class_noun: 'person',
    fixed: {
      hairColor: hair, facialHairColor: hair, skinColor: skin, clothesColor: clothes, hatColor: clothes,
      accessories: GLASSES.avataaars, accessoriesColor: ['262e33'], accessoriesProbability: 30, facialHairProbability: 20,
      clothing: ['blazerAndShirt', 'blazerAndSweater', 'collarAndSweater', 'hoodie', 'overall', 'shirtCrewNeck', 'shirtScoopNeck', 'shirtVNeck'],
    },
    expression: {
      mouth: ['default', 'smile', 'twinkle', 'serious', 'sad'],
      eyes: ['default', 'happy', 'wink', 'squint', 'side', 'surprised'],
      eyebrows: ['default', 'defaultNatural', 'flatNatural', 'raisedExcitedNatural', 'angryNatural'],
    },
  },
  micah: {
    class_noun: 'person',
    fixed: {
      hairColor: hair, baseColor: skin, shirtColor: clothes, facialHairColor: ['23201f'], glassesColor: ['000000'],
      earringColor: ['f4d150'], glassesProbability: 30, facialHairProbability: 20,
      hair: ['fonze', 'mrT', 'dougFunny', 'mrClean', 'dannyPhantom', 'full', 'turban', 'pixie'],
    },
    expression: { mouth: ['smile', 'laughing', 'smirk', 'frown', 'sad', 'surprised'], eyes: ['eyes', 'round', 'smiling'], eyebrows: ['up', 'down'] },
  },
  personas: {
    class_noun: 'person',
    fixed: { hairColor: hair, skinColor: skin, clothingColor: clothes, facialHairProbability: 25 },
    expression: { mouth: ['smile', 'bigSmile', 'frown', 'smirk', 'lips', 'surprise'] },
  },
  toonHead: {
    class_noun: 'character',
    fixed: { hairColor: hair, skinColor: skin, clothesColor: clothes, beardProbability: 30 },
    expression: { mouth: ['smile', 'laugh', 'sad', 'agape', 'angry'], eyes: ['happy', 'wide', 'wink', 'humble'], eyebrows: ['happy', 'neutral', 'raised', 'sad', 'angry'] },
  },
  bottts: {
    class_noun: 'robot',
    fixed: { baseColor: Object.values(COLOURS.robot) },
    expression: { mouth: ['bite', 'diagram', 'grill01', 'grill02', 'smile01', 'smile02', 'square01'] },
  },
};

// A small seeded generator (FNV-1a hash into mulberry32), so that a set is the same on every machine.
function generator(text) {
  let state = 0x811c9dc5;
  for (const c of text) state = Math.imul(state ^ c.codePointAt(0), 0x01000193) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// DiceBear's own generator gives neighbouring seeds ("a-1", "a-2") the same colours, so identities get a scrambled one.
function identitySeed(set, style, identity) {
  const random = generator(`${set}/${style}/${identity}`);
  return Array.from({ length: 4 }, () => Math.floor(random() * 2 ** 32).toString(36)).join('');
}

function render(set, style, identity, view) {
  const random = generator(`${set}/${style}/${identity}/${view}`);
  const pick = (list) => list[Math.floor(random() * list.length)];
  const spread = (width) => Math.round((random() * 2 - 1) * width);
  const background = pick(Object.keys(COLOURS.background));
  const options = {
    seed: identitySeed(set, style, identity),
    ...STYLES[style].fixed,
    backgroundColor: [COLOURS.background[background]],
    scale: 100 + spread(10),
    rotate: (spread(7) + 360) % 360,
    translateX: spread(5),
    translateY: spread(4),
    flip: random() < 0.5,
  };
  for (const [part, choices] of Object.entries(STYLES[style].expression)) options[part] = [pick(choices)];
  const avatar = createAvatar(collection[style], options);
  const { pixels } = new Resvg(avatar.toString(), { fitTo: { mode: 'width', value: SIZE } }).render();
  const rgb = Buffer.alloc(SIZE * SIZE * 3);
  for (let i = 0; i < SIZE * SIZE; i++) rgb.set(pixels.subarray(4 * i, 4 * i + 3), 3 * i);
  const traits = avatar.toJson().extra;
  delete traits.primaryBackgroundColor;
  delete traits.secondaryBackgroundColor;
  return { rgb, line: { set, style, class_noun: STYLES[style].class_noun, identity: `${style}-${identity}`, view, background, flip: options.flip, traits } };
}

const [data, ...wanted] = process.argv.slice(2);
if (!data) {
  console.error('usage: node render.mjs DATA [SET ...]');
  process.exit(2);
}
fs.mkdirSync(data, { recursive: true });
fs.writeFileSync(path.join(data, 'colours.json'), JSON.stringify(COLOURS, null, 1));
for (const set of wanted.length ? wanted : Object.keys(SETS).filter((name) => name !== 'crowd')) {
  const target = path.join(data, `${set}.jsonl`);
  if (fs.existsSync(target)) continue;
  const { identities, views } = SETS[set];
  const pixels = fs.openSync(path.join(data, `${set}.rgb`), 'w'); // a large set would not fit in one buffer
  const lines = [];
  for (const style of Object.keys(STYLES))
    for (let identity = 0; identity < identities; identity++)
      for (let view = 0; view < views; view++) {
        const { rgb, line } = render(set, style, identity, view);
        fs.writeSync(pixels, rgb);
        lines.push(JSON.stringify(line));
      }
  fs.closeSync(pixels);
  fs.writeFileSync(`${target}.tmp`, lines.join('\n') + '\n');
  fs.renameSync(`${target}.tmp`, target); // the line file marks a finished set
  console.error(`${set}: ${lines.length} pictures`);
}
